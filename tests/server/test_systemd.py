"""Socket activation: systemd has bound the ports, and keeps them when we end."""

from __future__ import annotations

import shutil
import signal
import smtplib
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import pytest

from relay.server import systemd
from support import forked
from support.certificates import Certificate
from support.child_processes import tied
from support.dialogue import Dialogue
from support.forked import ForkedProcess
from support.product import Product
from support.scripted_server import ScriptedServer
from support.waiting import free_port, wait_until


class Activated(Product):
    """A product that gets these sockets, as systemd passes them: as descriptors 3 and following."""

    sockets: tuple[socket.socket, ...] = ()

    def _launch(self, argv: list[str], log: IO[bytes]) -> ForkedProcess:
        return forked.start(
            ["smtp-dup", *argv[argv.index("relay.command") + 1 :]],
            cwd=self.directory,
            env=self.environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
            listening=[sock.fileno() for sock in self.sockets],
        )


Make = Callable[..., Activated]
Listening = Callable[..., socket.socket]


@pytest.fixture
def listening() -> Iterator[Listening]:
    """Call it for a listening socket on a free port."""
    with ExitStack() as ends:

        def bind(host: str = "127.0.0.1", **options: Any) -> socket.socket:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            return ends.enter_context(socket.create_server((host, 0), family=family, **options))

        yield bind


@pytest.fixture
def activated(tmp_path: Path) -> Iterator[Make]:
    """Call it for a product, not started, with these sockets; it listens where they are."""
    made: list[Activated] = []

    def make(*sockets: socket.socket, **options: Any) -> Activated:
        instance = Activated(tmp_path / f"product-{len(made)}", **options)
        made.append(instance)
        instance.sockets = sockets
        instance.smtp_port = sockets[0].getsockname()[1]
        instance.settings["smtp.listen"] = ",".join(f"127.0.0.1:{sock.getsockname()[1]}" for sock in sockets)
        instance.settings |= options.get("settings", {})
        return instance

    yield make
    for instance in made:
        instance.clean_up()


def port_of(sock: socket.socket) -> int:
    return int(sock.getsockname()[1])


def send(port: int) -> None:
    with Dialogue(port) as client:
        client.hello()
        assert client.mail("a@example.net", "b@example.com").startswith("250")


@pytest.mark.parametrize("command", ["up", "relay"])
def test_every_process_takes_from_every_passed_socket(
    activated: Make, listening: Listening, primary: ScriptedServer, redis_url: str, command: str
) -> None:
    """Whichever of the two processes hangs, the other takes mail on both ports."""
    instance = activated(
        listening(),
        listening(),
        primary=primary.address,
        command=command,
        redis_url=redis_url if command == "relay" else "",
        settings={"smtp.processes": "2"},
    )
    instance.start()
    for name in ("relay-1", "relay-2"):
        hanging = instance.child(name)
        hanging.signal(signal.SIGSTOP)
        for sock in instance.sockets:
            send(port_of(sock))
        hanging.signal(signal.SIGCONT)
    assert instance.stop() == 0
    assert len(primary.messages) == 4


def test_a_client_waits_while_we_are_restarted(
    activated: Make, listening: Listening, primary: ScriptedServer, backup: ScriptedServer
) -> None:
    """Nobody is refused between stop and start: the socket is systemd's and stays open."""
    instance = activated(listening(), primary=primary.address, backups=[backup.address])
    instance.start()
    send(instance.smtp_port)
    assert instance.stop() == 0
    with socket.create_connection(("127.0.0.1", instance.smtp_port), 60) as early:
        instance.start(wait=False)
        assert early.recv(100).startswith(b"220 ")
    send(instance.smtp_port)
    wait_until(lambda: instance.summary()["delivered"] == 2)


def test_what_begins_with_tls_is_told_by_the_address(
    activated: Make, listening: Listening, primary: ScriptedServer, certificate: Certificate
) -> None:
    """The order in which they are passed does not matter: smtp.listen_tls says it."""
    tls, plain = listening(), listening()
    settings = {
        "smtp.listen_tls": f"127.0.0.1:{port_of(tls)}",
        "smtp.listen": f"127.0.0.1:{port_of(plain)}",
        "smtp.tls_certificate": str(certificate.certificate),
        "smtp.tls_key": str(certificate.key),
    }
    instance = activated(tls, plain, primary=primary.address, settings=settings)
    instance.smtp_port = port_of(plain)
    instance.start()
    send(port_of(plain))
    with smtplib.SMTP_SSL("127.0.0.1", port_of(tls), context=certificate.client_context(), timeout=20) as client:
        client.sendmail("a@example.net", ["b@example.com"], b"Subject: one\r\n\r\nhello\r\n")
    assert len(primary.messages) == 2


def test_one_socket_for_both_families(activated: Make, listening: Listening, primary: ScriptedServer) -> None:
    """ListenStream=25 is one socket for IPv6 and IPv4: it is what `:25` means, and an IPv4 client is one."""
    everywhere = listening("::", dualstack_ipv6=True)
    instance = activated(everywhere, primary=primary.address, settings={"smtp.listen": f":{port_of(everywhere)}"})
    instance.start()
    for host in ("127.0.0.1", "::1"):
        with Dialogue(instance.smtp_port, host) as client:
            client.hello()
            client.mail("a@example.net", "b@example.com")
    wait_until(lambda: {event.get("client") for event in instance.events} >= {"127.0.0.1", "::1"})


def test_other_addresses_than_the_settings_name(activated: Make, listening: Listening, primary: ScriptedServer) -> None:
    """One line that says what is where, and status 2: a restart cannot help, so systemd does not try."""
    sock, other = listening(), free_port()
    for setting, words in (
        (f"127.0.0.1:{other}", f"127.0.0.1:{port_of(sock)} was passed, the settings have 127.0.0.1:{other}"),
        (
            f"127.0.0.1:{port_of(sock)},[::1]:{other}",
            f"[::1]:{other} was not passed, only 127.0.0.1:{port_of(sock)}",
        ),
    ):
        instance = activated(sock, primary=primary.address, settings={"smtp.listen": setting})
        instance.start(wait=False)
        assert instance.wait() == 2
        (line,) = instance.log.splitlines()
        assert line.startswith(f"smtp-dup: socket activation: smtp.listen: {words}. ListenStream=")


@pytest.mark.parametrize("kind", ["datagram", "not listening", "unix", "no socket"])
def test_what_cannot_be_listened_on(activated: Make, listening: Listening, primary: ScriptedServer, kind: str) -> None:
    """It is said by the descriptor's number."""
    instance = activated(listening(), primary=primary.address)
    with ExitStack() as ends:
        made: Any = {
            "datagram": lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
            "not listening": socket.socket,
            "unix": lambda: socket.socket(socket.AF_UNIX),
            "no socket": lambda: (instance.directory / "file").open("w"),
        }[kind]()
        instance.sockets = (ends.enter_context(made),)
        instance.start(wait=False)
        assert instance.wait() == 2
    assert "descriptor 3 was passed, but" in instance.log


def test_what_is_meant_for_another_process_is_not_ours(
    product: Callable[..., Product], primary: ScriptedServer
) -> None:
    """Inherited variables of a parent's activation change nothing: it binds as always."""
    environ = {"LISTEN_PID": "1", "LISTEN_FDS": "1", "LISTEN_FDNAMES": "x", "HOME": "/"}
    assert systemd.take(environ) == []
    assert environ == {"HOME": "/"}


@pytest.mark.skipif(not shutil.which("systemd-socket-activate"), reason="systemd-socket-activate is not installed")
def test_systemd_starts_us_for_the_first_client(
    product: Callable[..., Product], primary: ScriptedServer, backup: ScriptedServer
) -> None:
    """systemd's own tool: it listens, and the first client is the start; that client is served."""
    instance = product(start=False, primary=primary.address, backups=[backup.address])
    words = ["systemd-socket-activate", f"--listen={instance.address}"]
    words += [f"--setenv={name}={value}" for name, value in instance.environment.items()]
    with instance.log_file.open("ab") as log:
        instance.process = subprocess.Popen(
            tied([*words, *instance._argv("up")]),
            cwd=instance.directory,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    instance.wait_for_log("Listening on")
    send(instance.smtp_port)
    wait_until(lambda: instance.summary()["delivered"] == 1)
    assert instance.stop() == 0
