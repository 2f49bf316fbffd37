"""What the container files promise, as far as it can be seen without an engine."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from relay.config.loader import load
from relay.config.options import OPTIONS
from support import documents
from support.compose_stack import ROOT


def test_compose_passes_every_option_on() -> None:
    """A new option is not forgotten in compose.yaml, and what it names is an option."""
    text = (ROOT / "compose.yaml").read_text()
    settings = text.partition("x-settings:")[2].partition("x-confined:")[0]
    named = re.findall(r"^  (SMTP_DUP_\w+):", settings, re.MULTILINE)
    assert sorted(named) == sorted(option.variables[0] for option in OPTIONS)


def override() -> str:
    (block,) = (b for b in documents.blocks() if b.page == "docker.md" and b.language == "yaml")
    assert block.text.startswith("# compose.override.yaml\n")
    return block.text


def test_the_override_of_the_page_fits() -> None:
    """It adds to services that there are, and declares the secrets that it uses."""
    own: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text("utf-8"))
    added = yaml.safe_load(override())
    assert set(added) == {"services", "secrets"}
    assert set(added["services"]) <= set(own["services"])
    assert {name for service in added["services"].values() for name in service["secrets"]} == set(added["secrets"])
    variables = set(re.findall(r"\$\{(\w+)", (ROOT / "compose.yaml").read_text("utf-8")))
    page = (ROOT / "docs" / "docker.md").read_text("utf-8")
    assert {name for name in variables if not name.startswith("SMTP_DUP_")} <= set(re.findall(r"`(\w+)`", page))


def test_compose_has_no_objection(tmp_path: Path) -> None:
    """`docker compose config` takes compose.yaml, with the .env of the page, alone and with the page's override."""
    if (
        not shutil.which("docker")
        or subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode
    ):
        pytest.skip("no Compose v2")
    shutil.copy(ROOT / "compose.yaml", tmp_path)
    (tmp_path / "new_password").write_text("secret")
    (block,) = (b for b in documents.blocks() if b.page == "docker.md" and ".env <<" in b.text)
    subprocess.run(["bash", "-euc", block.text.partition("docker compose")[0]], cwd=tmp_path, check=True)
    for _ in range(2):
        done = subprocess.run(
            ["docker", "compose", "config", "--format", "json"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "old.example.com:25" in done.stdout
        (tmp_path / "compose.override.yaml").write_text(override())
    assert done.stdout.count('"new_password"') >= 3


def test_the_defaults_of_the_image() -> None:
    """In a container it listens where a published port leads to, and lets private networks in, nobody else."""
    environ = {"SMTP_DUP_DEFAULTS": str(ROOT / "deploy/docker/defaults.toml")}
    settings = load({}, environ, [], require_primary=False)
    assert settings.smtp.addresses == (("", 2525),)
    assert str(settings.state_dir) == "/var/lib/smtp-dup"
    assert all(
        settings.smtp.allows(a) for a in ("127.0.0.1", "::1", "172.17.0.1", "10.1.2.3", "192.168.1.1", "fd00::1")
    )
    assert not any(settings.smtp.allows(a) for a in ("8.8.8.8", "172.32.0.1", "2001:db8::1"))


def test_the_dashboard_has_the_rq_of_the_workers() -> None:
    """It writes jobs (Requeue) that the workers read, so both name the same versions."""
    here = re.search(r'"(rq>=[^"]+)"', (ROOT / "pyproject.toml").read_text())
    there = re.search(r"^(rq>=\S+)", (ROOT / "deploy/dashboard/requirements.txt").read_text(), re.MULTILINE)
    assert here
    assert there
    assert here[1] == there[1]


def test_no_file_names_an_index_or_a_credential() -> None:
    """The files build anywhere: what pip uses is the builder's business."""
    for path in [ROOT / "Dockerfile", ROOT / "compose.yaml", *(ROOT / "deploy/dashboard").iterdir()]:
        if path.is_file():
            assert not re.search(r"--(extra-)?index-url|--trusted-host|PIP_|/root/\.(?!cache/pip)", path.read_text()), (
                path
            )
