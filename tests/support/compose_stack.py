"""compose.yaml run for real: a project of its own with free ports, and real SMTP servers where containers find them.

It works on a copy of the files that the images are made of, so that no .env of the checkout takes part. Everything
that it makes (containers, networks, volumes, images) goes with ``remove``.
"""

from __future__ import annotations

import base64
import contextlib
import ipaddress
import json
import os
import shutil
import smtplib
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from support.scripted_server import ScriptedServer, Transaction
from support.waiting import free_port, wait_until

ROOT = Path(__file__).parent.parent.parent
_FILES = ("compose.yaml", "Dockerfile", ".dockerignore", "pyproject.toml", "README.md", "LICENSE.md")
_FOLDERS = ("relay", "workers", "deploy")
BUILD_SECONDS = 900.0
SECONDS = 180.0


def unavailable() -> str:
    """Return why no stack can run here, "" when one can."""
    if not shutil.which("docker"):
        return "no container engine: docker is not installed"
    for words, without in ((["compose", "version"], "no Compose v2"), (["info"], "the container engine does not run")):
        done = subprocess.run(["docker", *words], capture_output=True, text=True, check=False)
        if done.returncode:
            return f"{without}: {done.stderr.strip().splitlines()[0] if done.stderr.strip() else 'docker fails'}"
    try:
        with socket.socket() as probe:
            probe.bind((gateway(), 0))
    except OSError as error:
        return f"containers cannot reach servers of this machine: {gateway()}: {error.strerror}"
    return ""


def docker(*words: str, **options: Any) -> str:
    """Run docker; fails with what it says. Returns its output."""
    done = subprocess.run(
        ["docker", *words], capture_output=True, text=True, check=False, timeout=BUILD_SECONDS, **options
    )
    assert done.returncode == 0, f"docker {' '.join(words)}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout.strip()


def gateway() -> str:
    """Return the address of this machine that host.docker.internal stands for."""
    config = json.loads(docker("network", "inspect", "bridge", "--format", "{{json (index .IPAM.Config 0)}}"))
    return config.get("Gateway") or str(ipaddress.ip_network(config["Subnet"])[1])  # some engines leave it out


def server(**options: Any) -> ScriptedServer:
    """Return a started server that containers reach at ``outside(server)``."""
    made = ScriptedServer(**options)
    made.host = gateway()
    return made.start()


def outside(of: ScriptedServer) -> str:
    """Return the server's address as a container says it."""
    return f"host.docker.internal:{of.port}"


def send(port: int, subject: str, *recipients: str, more: str = "") -> None:
    """Send a message, with ``more`` lines at its end, through a published port. Raises smtplib.SMTPException."""
    message = f"Subject: {subject}\r\n\r\nThis is {subject}.\r\n.\r\n..and its end\r\n{more}"
    client = smtplib.SMTP("127.0.0.1", port, timeout=60)
    with contextlib.closing(client):  # without QUIT: a relay that stops may have said 421 after its 250
        client.sendmail("sender@example.com", list(recipients or ("somebody@example.org",)), message)


def named(at: ScriptedServer, subject: str) -> list[Transaction]:
    """Return the accepted messages with this subject."""
    return [message for message in at.messages if message.header("Subject") == subject]


class Stack:
    """One project. ``variables`` are written to its .env; ``shell`` are those of the shell that calls compose."""

    def __init__(self, directory: Path, variables: Mapping[str, str]) -> None:
        self.name = f"smtp-dup-test-{os.getpid()}"
        self.directory = directory / "checkout"
        self.smtp_port, self.dashboard_port = free_port(), free_port()
        self.directory.mkdir()
        for name in _FILES:
            shutil.copy(ROOT / name, self.directory / name)
        for name in _FOLDERS:
            shutil.copytree(ROOT / name, self.directory / name, ignore=shutil.ignore_patterns("__pycache__"))
        given = {
            "PUBLISH_SMTP": f"127.0.0.1:{self.smtp_port}",
            "PUBLISH_DASHBOARD": f"127.0.0.1:{self.dashboard_port}",
            **variables,
        }
        (self.directory / ".env").write_text("".join(f"{name}={value}\n" for name, value in given.items()))

    def run(
        self, *words: str, shell: Mapping[str, str] | None = None, timeout: float = SECONDS
    ) -> subprocess.CompletedProcess[str]:
        """Run `docker compose ...`, whatever its exit status."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SMTP_DUP_", "DASHBOARD_"))}
        return subprocess.run(
            ["docker", "compose", "--project-name", self.name, *words],
            cwd=self.directory, env={**kept, **(shell or {})}, capture_output=True, text=True,
            timeout=timeout, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def compose(self, *words: str, timeout: float = SECONDS) -> str:
        """Run `docker compose ...`; fails with what it says. Returns its output."""
        done = self.run(*words, timeout=timeout)
        assert done.returncode == 0, f"docker compose {' '.join(words)}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout.strip()

    def up(self) -> None:
        """Start what does not run, and wait until all of it is healthy."""
        done = self.run("up", "--detach", "--wait")
        assert done.returncode == 0, f"up: {done.stdout}{done.stderr}\n{self.run('logs', '--tail', '40').stdout}"

    def remove(self) -> None:
        """Leave nothing behind."""
        self.run("down", "--volumes", "--rmi", "local", "--remove-orphans", "--timeout", "5")

    def container(self, service: str) -> dict[str, Any]:
        """Return what `docker inspect` says of a service's container."""
        identity = self.compose("ps", "--all", "--quiet", service)
        inspected: list[dict[str, Any]] = json.loads(docker("inspect", identity))
        return inspected[0]

    def kill(self, service: str) -> None:
        """SIGKILL for what runs in a container, as the kernel does it; `docker kill` would stay dead by intent."""
        restarts = self.container(service)["RestartCount"]
        self.run("exec", "--no-TTY", service, "sh", "-c", "kill -9 -1")
        wait_until(
            lambda: self.container(service)["RestartCount"] > restarts, 60, f"{service} starts again", interval=0.2
        )

    def wait_healthy(self, service: str) -> None:
        wait_until(
            lambda: self.container(service)["State"].get("Health", {}).get("Status") == "healthy",
            SECONDS, f"{service} is healthy", interval=0.5,
        )  # fmt: skip

    def json(self, *words: str) -> list[dict[str, Any]]:
        """Return the objects of one of our listings."""
        text = self.compose("exec", "--no-TTY", "workers", "smtp-dup", *words, "--json")
        return [json.loads(line) for line in text.splitlines() if line.startswith("{")]

    def summary(self) -> dict[str, Any]:
        (row,) = self.json("queue", "summary")
        return row

    def send(self, subject: str, *recipients: str, more: str = "") -> None:
        """Send a message, with ``more`` lines at its end, through the published port. Raises smtplib.SMTPException."""
        send(self.smtp_port, subject, *recipients, more=more)

    def dashboard(
        self, path: str, *, post: bool = False, login: str = "", headers: Mapping[str, str] | None = None
    ) -> tuple[int, str]:
        """Ask the dashboard. Returns the status and the text."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.dashboard_port}{path}", data=b"" if post else None, headers=dict(headers or {})
        )
        if login:
            request.add_header("Authorization", f"Basic {base64.b64encode(login.encode()).decode()}")
        try:
            with urllib.request.urlopen(request, timeout=30) as response:
                return response.status, response.read().decode("utf-8", "replace")
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()
