"""The listening sockets: on machines that lack IPv6, and addresses that are not there."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from loguru import logger

from relay.config.loader import Settings, load
from relay.monitoring.listener import bind
from relay.server import listening
from support.waiting import free_port


def settings(folder: Path, **values: str) -> Settings:
    flags = {
        "relay.destination_primary": "primary.example.com:25",
        "smtp.processes": "1",
        "state_dir": str(folder),
        **{key.replace("__", "."): value for key, value in values.items()},
    }
    return load(flags, {}, [])


@pytest.fixture(params=["no such family", "no such address"])
def without_ipv6(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel without IPv6 makes no such socket; one where it is disabled has no address to bind."""

    class Socket(socket.socket):
        def __init__(self, family: int = -1, *args: Any, **options: Any) -> None:
            if family == socket.AF_INET6 and request.param == "no such family":
                raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))
            super().__init__(family, *args, **options)

        def bind(self, address: Any) -> None:
            if self.family == socket.AF_INET6:
                raise OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
            super().bind(address)

    monkeypatch.setattr(socket, "socket", Socket)


@pytest.fixture
def listen() -> Iterator[Callable[[Settings], list[socket.socket]]]:
    """Bind as the product does, and close at the end."""
    bound: list[socket.socket] = []

    def run(given: Settings) -> list[socket.socket]:
        found = [sock for place in listening.listen(given) for sock in place.sockets]
        bound.extend(found)
        return found

    yield run
    for sock in bound:
        sock.close()


@pytest.mark.parametrize("host", ["", "localhost"])
@pytest.mark.usefixtures("without_ipv6")
def test_without_ipv6_it_listens_on_ipv4_and_says_so(tmp_path, listen, host, monkeypatch):
    """What stands for both families is what the machine has of them."""
    both = [(socket.AF_INET6, ("::1", 0)), (socket.AF_INET, ("127.0.0.1", 0))]
    port = free_port()
    monkeypatch.setattr(listening, "_resolve", lambda _host, port: [(f, (a, port)) for f, (a, _) in both])
    lines: list[str] = []
    sink = logger.add(lines.append, level="WARNING")
    sockets = listen(settings(tmp_path, smtp__listen=f"{host}:{port}"))
    logger.remove(sink)
    assert [sock.family for sock in sockets] == [socket.AF_INET]
    assert len([line for line in lines if "listening on IPv4 alone" in line]) == 1


@pytest.mark.usefixtures("without_ipv6")
def test_an_ipv6_address_that_is_asked_for_is_not_dropped(tmp_path):
    """Where nothing is left to listen on, it does not start, and the line names the address."""
    with pytest.raises(OSError, match=r"smtp.listen: cannot listen on ::1 port"):
        listening.listen(settings(tmp_path, smtp__listen=f"[::1]:{free_port()}"))


@pytest.mark.usefixtures("without_ipv6")
def test_the_status_server_too(tmp_path):
    """Without IPv6 it answers on IPv4."""
    with bind(settings(tmp_path, status__listen=f":{free_port()}")) as listener:
        assert listener.family == socket.AF_INET


def test_an_address_that_is_not_there_is_one_line(tmp_path):
    """Another machine's address is named, with what the system says."""
    with pytest.raises(OSError, match=r"^smtp.listen: cannot listen on 192.0.2.1 port \d+: Cannot assign"):
        listening.listen(settings(tmp_path, smtp__listen=f"192.0.2.1:{free_port()}"))
