"""The image on its own, as GoSMTP-dup's users run theirs: three variables or a config.yaml, no Redis named."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from support import compose_stack, documents
from support.compose_stack import ROOT, docker, named, outside, send
from support.scripted_server import ScriptedServer
from support.waiting import free_port, wait_until

pytestmark = [pytest.mark.compose, pytest.mark.timeout(900)]

IMAGE = f"smtp-dup-test-image-{os.getpid()}"
TO_THE_HOST = "--add-host=host.docker.internal:host-gateway"
CONFIG = """\
smtp:
  listen: "0.0.0.0:2525"
  domain: "mail.example.com"

relay:
  destination_primary: "{primary}"
  destination_backups:
    - "{backup}"
  timeout_seconds: 10
"""

Run = Callable[..., str]


@pytest.fixture(scope="module")
def image() -> Iterator[str]:
    if reason := compose_stack.unavailable():
        pytest.skip(reason)
    docker("build", "--quiet", "--tag", IMAGE, str(ROOT))
    yield IMAGE
    docker("image", "rm", "--force", IMAGE)


@pytest.fixture
def run(image: str) -> Iterator[Run]:
    """Call it with the options of `docker run`: a detached container, healthy when it returns. Returns its id."""
    made: list[str] = []

    def start(*options: str) -> str:
        identity = docker("run", "--detach", TO_THE_HOST, *options, image)
        made.append(identity)
        wait_until(lambda: health(identity) == "healthy", 60, lambda: logs(identity), interval=0.5)
        return identity

    yield start
    for identity in made:
        docker("rm", "--force", "--volumes", identity)


@pytest.fixture
def servers(image: str) -> Iterator[tuple[ScriptedServer, ScriptedServer]]:
    with ExitStack() as ends:
        made = compose_stack.server(), compose_stack.server()
        for server in made:
            ends.callback(server.stop)
        yield made


def health(identity: str) -> str:
    return docker("inspect", "--format", "{{.State.Status}} {{.State.Health.Status}}", identity).removeprefix(
        "running "
    )


def logs(identity: str) -> str:
    done = subprocess.run(["docker", "logs", identity], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def three_variables(primary: ScriptedServer, backup: ScriptedServer) -> list[str]:
    given = {
        "SMTP_DUP_SMTP_LISTEN": "0.0.0.0:2525",
        "SMTP_DUP_RELAY_DESTINATION_PRIMARY": outside(primary),
        "SMTP_DUP_RELAY_DESTINATION_BACKUPS": outside(backup),
    }
    return [word for name, value in given.items() for word in ("--env", f"{name}={value}")]


def test_three_variables_are_enough(run: Run, servers: tuple[ScriptedServer, ScriptedServer]) -> None:
    """It relays and copies with a Redis of its own, on a read-only root without a capability, and stops at once."""
    primary, backup = servers
    port = free_port()
    options = ["--publish", f"127.0.0.1:{port}:2525", "--read-only", "--cap-drop=ALL", *three_variables(*servers)]
    identity = run(*options)
    send(port, "drop-in")
    backup.wait_until(lambda: named(backup, "drop-in"))
    assert named(primary, "drop-in")[0].content == named(backup, "drop-in")[0].content
    assert docker("exec", identity, "id", "-u") == "2525"
    assert docker("exec", identity, "nc", "-z", "localhost", "2525") == ""
    assert subprocess.run(["docker", "exec", identity, "nc", "-z", "localhost", "1"], check=False).returncode == 1
    summary = json.loads(docker("exec", identity, "smtp-dup", "queue", "summary", "--json"))
    assert (summary["delivered"], summary["pending"]) == (1, 0)
    docker("stop", identity)
    assert docker("inspect", "--format", "{{.State.ExitCode}}", identity) == "0"


def test_the_command_of_the_page(image: str, servers: tuple[ScriptedServer, ScriptedServer]) -> None:
    """docs/docker.md's `docker run`, with names and ports of our own: it relays, copies, and tells the queue."""
    primary, backup = servers
    (block,) = (b for b in documents.blocks() if b.page == "docker.md" and "docker run --detach" in b.text)
    port = free_port()
    text = re.sub(
        r"(?m)^docker build .*\n|^  smtp-dup$", lambda found: f"  {image}" if found[0][0] == " " else "", block.text
    )
    for before, after in (
        ("--name smtp-dup", f"--name {image} {TO_THE_HOST}"),
        ("--volume smtp-dup:", f"--volume {image}:"),
        ("127.0.0.1:2525:", f"127.0.0.1:{port}:"),
        ("old.example.com:25", outside(primary)),
        ("new.example.com:25", outside(backup)),
        ("docker exec smtp-dup ", f"docker exec {image} "),
    ):
        assert before in text
        text = text.replace(before, after)
    start, _, look = text.rpartition("docker exec")
    try:
        subprocess.run(["bash", "-euc", start], check=True, capture_output=True)
        wait_until(lambda: health(image) == "healthy", 60, lambda: logs(image), interval=0.5)
        send(port, "by the page")
        backup.wait_until(lambda: named(backup, "by the page"))
        assert len(named(primary, "by the page")) == 1
        told = subprocess.run(["bash", "-euc", f"docker exec{look}"], check=True, capture_output=True, text=True).stdout
        assert "delivered" in told
    finally:
        subprocess.run(["docker", "rm", "--force", image], check=False, capture_output=True)
        subprocess.run(["docker", "volume", "rm", image], check=False, capture_output=True)


def test_the_volume_keeps_what_waits(run: Run, servers: tuple[ScriptedServer, ScriptedServer]) -> None:
    """A new container on the volume of a killed one delivers what the old one had promised."""
    _, backup = servers
    backup.replies["RCPT"] = "451 4.7.1 later"
    port = free_port()
    volume = docker("volume", "create")
    try:
        options = ["--publish", f"127.0.0.1:{port}:2525", "--volume", f"{volume}:/var/lib/smtp-dup"]
        options += ["--env", "SMTP_DUP_RETRY_FIRST=1", *three_variables(*servers)]
        first = run(*options)
        send(port, "kept")
        docker("kill", first)
        docker("rm", first)
        backup.replies.clear()
        run(*options)
        # Killed before it made a job for the copy, it leaves that to the reconciler, which looks every minute.
        backup.wait_until(lambda: named(backup, "kept"), 180)
    finally:
        for identity in docker("ps", "--all", "--quiet", "--filter", f"volume={volume}").split():
            docker("rm", "--force", identity)
        docker("volume", "rm", volume)


@pytest.mark.parametrize("folder", ["/app", "/etc/smtp-dup"])
def test_its_configuration_file_works_as_it_is(
    run: Run, servers: tuple[ScriptedServer, ScriptedServer], tmp_path: Path, folder: str
) -> None:
    """GoSMTP-dup's config.yaml, mounted where its documentation says, is all that is needed."""
    primary, backup = servers
    file = tmp_path / "config.yaml"
    file.write_text(CONFIG.format(primary=outside(primary), backup=outside(backup)))
    for path in (file, *list(tmp_path.parents)[:2]):
        path.chmod(0o755)  # the container's user must be able to read it
    port = free_port()
    run("--publish", f"127.0.0.1:{port}:2525", "--volume", f"{file}:{folder}/config.yaml:ro")
    send(port, "configured")
    backup.wait_until(lambda: named(backup, "configured"))
    assert len(named(primary, "configured")) == 1


def test_a_container_without_settings_says_what_is_missing(image: str) -> None:
    """No primary: one line, status 2."""
    done = subprocess.run(["docker", "run", "--rm", image], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert "SMTP_DUP_RELAY_DESTINATION_PRIMARY" in done.stderr


def test_the_image_is_small(image: str) -> None:
    """Less than 200 MB with its base, whose own size is some 130 MB at most."""
    size, base = (int(docker("image", "inspect", "--format", "{{.Size}}", n)) for n in (image, "python:3.12-slim"))
    assert size - base < 70 << 20


def test_the_image_says_how_it_is_run(image: str) -> None:
    """A user with a number and no rights, a health check, SIGTERM as its end, a volume for the state; no pip inside."""
    config = json.loads(docker("image", "inspect", "--format", "{{json .Config}}", image))
    assert config["User"] == "2525:2525"
    assert config["StopSignal"] == "SIGTERM"
    assert config["Healthcheck"]["Test"] == ["CMD", "smtp-dup-health"]
    assert set(config["Volumes"]) == {"/var/lib/smtp-dup"}
    assert (config["Entrypoint"], config["Cmd"]) == (["smtp-dup"], ["up"])
    assert (
        docker("run", "--rm", "--entrypoint", "sh", image, "-c", "ls /opt/smtp-dup/bin | grep -c ^pip || true") == "0"
    )
