"""What the container files promise, as far as it can be seen without an engine."""

from __future__ import annotations

import re

from compose_stack import ROOT
from relay.options import OPTIONS
from relay.settings import load


def test_compose_passes_every_option_on() -> None:
    """A new option is not forgotten in compose.yaml, and what it names is an option."""
    text = (ROOT / "compose.yaml").read_text()
    settings = text.partition("x-settings:")[2].partition("x-confined:")[0]
    named = re.findall(r"^  (SMTP_DUP_\w+):", settings, re.MULTILINE)
    assert sorted(named) == sorted(option.variables[0] for option in OPTIONS)


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
