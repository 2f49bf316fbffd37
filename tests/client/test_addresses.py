"""A host with several addresses: one that does not serve is never the reason that mail waits (RFC 5321 5.1)."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from relay.client.connect import connect
from relay.client.errors import ConnectFailed
from relay.config.loader import load
from relay.mail.destination import Destination
from relay.mail.timeouts import Timeouts
from relay.monitoring.probes import probe_destination
from support.certificates import Certificate
from support.dialogue import AsyncDialogue
from support.in_process_relay import serve
from support.reactions import Close, Reset, Silence
from support.scripted_server import ScriptedServer

Pair = Callable[..., tuple[ScriptedServer, ScriptedServer]]
HOST = "two.example.com"
RESOLVE = socket.getaddrinfo


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    """Two servers at two addresses of one name and port."""
    started: list[ScriptedServer] = []

    def start(first: dict[str, Any], second: dict[str, Any] | None = None) -> tuple[ScriptedServer, ScriptedServer]:
        one = ScriptedServer(**first).start()
        started.append(one)
        two = ScriptedServer(**(second or {}), port=one.port)
        two.host = "127.0.0.2"
        started.append(two.start())

        def resolve(host: Any, port: Any, *args: Any, **options: Any) -> Any:
            if host in (HOST, f"{HOST}.") and not options.get("flags") and not any(args[3:]):
                return [RESOLVE(server.host, port, type=socket.SOCK_STREAM)[0] for server in (one, two)]
            return RESOLVE(host, port, *args, **options)

        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        return one, two

    yield start
    for server in started:
        server.stop()


def at(server: ScriptedServer, **options: Any) -> Destination:
    return replace(server.destination(**options), host=HOST)


@pytest.mark.parametrize(
    "fault",
    [
        {"replies": {"CONNECT": "421 4.3.2 busy"}},
        {"replies": {"CONNECT": "554 5.3.2 no service here"}},
        {"replies": {"CONNECT": Close()}},
        {"replies": {"CONNECT": Reset()}},
        {"replies": {"CONNECT": "what?"}},
        {"replies": {"CONNECT": Silence()}},
        {"replies": {"EHLO": "421 4.3.2 busy"}},
        {"replies": {"EHLO": "550 5.7.1 not you"}},
        {"replies": {"EHLO": Close()}},
        {"replies": {"EHLO": Silence()}},
    ],
    ids=str,
)
async def test_the_next_address_serves(pair: Pair, fault: dict[str, Any]) -> None:
    """The first connects, and then greets with a refusal, closes or is silent: the second has the session, in time."""
    one, two = pair(fault)
    started = time.monotonic()
    connection = await connect(at(one), local_hostname="relay.example", timeouts=Timeouts.of(2))
    connection.close()
    assert time.monotonic() - started < 20
    assert (len(one.connections), len(two.connections)) == (1, 1)
    found = await probe_destination(at(one), "primary", local_hostname="relay.example", timeouts=Timeouts.of(2))
    assert found.ok


async def test_no_address_serves(pair: Pair) -> None:
    """What a server said is told, whichever of them it was."""
    one, two = pair({"replies": {"CONNECT": "554 5.3.2 no service"}})
    two.refuse()
    with pytest.raises(ConnectFailed, match=r"554 5\.3\.2 no service"):
        await connect(at(one), local_hostname="relay.example", timeouts=Timeouts.of(2))


async def test_a_password_is_refused_once(pair: Pair) -> None:
    """A wrong password is not shown to the next address: that would count as another guess."""
    one, two = pair({"replies": {"AUTH": "535 5.7.8 no"}, "extensions": ["AUTH PLAIN"]})
    with pytest.raises(ConnectFailed, match="AUTH"):
        await connect(
            at(one, username="u", password="p", tls="none"), local_hostname="relay.example", timeouts=Timeouts.of(2)
        )
    assert (len(one.connections), len(two.connections)) == (1, 0)


async def test_a_certificate_of_one_address(pair: Pair, certificate: Certificate, tmp_path: Any) -> None:
    """With verify, an address with another's certificate gets nothing, and the next one is verified like it."""
    right = Certificate(tmp_path, HOST)
    one, two = pair({"tls": certificate.server_context()}, {"tls": right.server_context()})
    server = at(one, tls="verify", ca_file=str(right.certificate))
    connection = await connect(server, local_hostname="relay.example", timeouts=Timeouts.of(5))
    assert connection.is_encrypted
    connection.close()
    assert [c.helo for c in two.connections] == ["relay.example"]


@pytest.mark.parametrize("implicit_tls", [True, False])
async def test_the_dot_of_the_root(pair: Pair, tmp_path: Any, implicit_tls: bool) -> None:
    """A name written with its last dot is verified, and asked for (SNI), without it."""
    right, names = Certificate(tmp_path, HOST), list[str | None]()
    context = right.server_context()
    context.sni_callback = lambda _, name, __: names.append(name)
    one, _ = pair({"tls": context, "implicit_tls": implicit_tls})
    server = replace(at(one, tls="verify", ca_file=str(right.certificate)), host=f"{HOST}.")
    connection = await connect(server, local_hostname="relay.example", timeouts=Timeouts.of(5))
    connection.close()
    assert names == [HOST]


async def test_a_message_by_the_second_address(pair: Pair, redis_url: str) -> None:
    """A client never hears that the first address of the primary refuses everybody."""
    one, two = pair({"replies": {"CONNECT": "421 4.3.2 busy"}})
    settings = load({"relay.destination_primary": f"{HOST}:{one.port}", "relay.timeout_seconds": "5"}, {}, ())
    async with serve(settings, redis_url) as (_, port), await AsyncDialogue.open(port) as client:
        await client.hello()
        await client.mail("a@example.com", "b@example.com")
    assert len(two.messages) == 1
