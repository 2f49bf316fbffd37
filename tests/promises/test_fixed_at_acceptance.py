"""Whom a copy is owed to is decided at acceptance: settings that change while it waits change nothing of that."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import redis

from relay.ledger import changes, keys, queries, recovery
from relay.mail.destination import Destination
from relay.mail.envelope import Envelope, MalformedRecord
from relay.mail.recipient import Recipient
from relay.mail.record import Message
from support import listed_copies
from support.ledger_contents import Contents
from support.product import QUICK, Product
from support.scripted_server import ScriptedServer
from support.waiting import wait_until
from workers.delivery.copy import Copy
from workers.queues import backlog

Make = Callable[..., Product]

SETTINGS = {
    **QUICK,
    "relay.timeout_seconds": "5",
    "relay.uncertain_hold": "1",
}
BOTH = ("u@x.example", "v@y.example")


def _destination(*domains: str, name: str = "new") -> Destination:
    return Destination(name=name, host="localhost", port=25, domains=domains)


def _envelope(*to: str, **more: object) -> Envelope:
    return Envelope("0123456789abcdef", "a@test", tuple(map(Recipient, to)), 1.0, 3, destinations=("new",), **more)


# The record -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("promised", [None, (), (("new", (1,)),), (("new", (0, 1)), ("other", (0,)))])
def test_the_promise_is_stored_with_the_message(promised: tuple[tuple[str, tuple[int, ...]], ...] | None) -> None:
    """It is read back as it was decided, and a record without it is one of an older version."""
    message = Message(_envelope(*BOTH, promised=promised), b"x\r\n")
    assert Message.unpack(message.pack(), message.envelope.id) == message


@pytest.mark.parametrize("domains", [(), ("x.example",), ("y.example",), ("z.example",)])
def test_a_filter_of_today_takes_nothing_from_a_promise(domains: tuple[str, ...]) -> None:
    """All recipients, or those that are named, whatever the backup is set to now."""
    new = _destination(*domains)
    assert _envelope(*BOTH, promised=()).owed_to(new) == (0, 1)
    assert _envelope(*BOTH, promised=(("new", (0,)),)).owed_to(new) == (0,)


@pytest.mark.parametrize(("domains", "owed"), [((), (0, 1)), (("y.example",), (1,)), (("z.example",), (0, 1))])
def test_an_old_record_owes_what_the_filter_says_and_never_nothing(
    domains: tuple[str, ...], owed: tuple[int, ...]
) -> None:
    """It does not say what was promised: the filter of today stands for it, unless that would settle it unsent."""
    assert _envelope(*BOTH).owed_to(_destination(*domains)) == owed


@pytest.mark.parametrize("indices", [[2], [-1], [], ["0"], None, 0])
def test_a_promise_to_nobody_is_no_record(indices: object) -> None:
    """What comes out of the store is data: a recipient that is not there is said, not skipped."""
    record = json.loads(_envelope(*BOTH, promised=()).to_json())
    with pytest.raises(MalformedRecord):
        Envelope.from_json(json.dumps({**record, "for": {"new": indices}}).encode())


# All that ask whom a copy is owed to -----------------------------------------------------------------------------


@pytest.fixture
def contents(redis_client: redis.Redis) -> Contents:
    return Contents(redis_client)


def _rewrite(contents: Contents, message_id: str, promised: tuple[tuple[str, tuple[int, ...]], ...]) -> None:
    """Make a stored record one that has the promise."""
    found = queries.message(contents.connection, message_id)
    record = json.loads(found.envelope.to_json()) | {"for": dict(promised)}
    message = Message(Envelope.from_json(json.dumps(record).encode()), found.body)
    contents.connection.set(keys.MESSAGE + message_id, message.pack())


def test_everybody_asks_the_record(contents: Contents) -> None:
    """The worker, listings, and what becomes of an uncertain message agree."""
    contents.register(_destination("z.example"))
    waiting, held = contents.pending(*BOTH), contents.staged(*BOTH)
    for message_id in (waiting, held):
        _rewrite(contents, message_id, (("new", (0,)),))
    (row,) = listed_copies.waiting(contents.connection)
    assert row.recipients == BOTH[:1]
    job = contents.enqueue(waiting)
    (claim,) = contents.claim(job, waiting)
    message = queries.message(contents.connection, waiting)
    assert Copy.of(claim, message, _destination("z.example")).owed == [0]
    with contents.connection.pipeline() as pipe:
        changes.hold(pipe, [changes.Held(held, "", -1)])
        pipe.execute()
    (recovered,) = recovery.copy_due(contents.connection, [_destination("y.example")])
    assert recovered.shares["new"] == ((0,), 0, "")


@pytest.mark.parametrize("domains", [(), ("y.example",), ("z.example",)])
def test_a_moved_copy_keeps_its_recipients_whatever_the_filter_there_is(
    contents: Contents, domains: tuple[str, ...]
) -> None:
    """`queue move` gives on what was promised, and the new destination's filter, now or later, takes nothing off."""
    contents.register(_destination(*domains, name="target"))
    old, new = contents.pending(*BOTH), contents.pending(*BOTH)
    _rewrite(contents, new, ())
    assert backlog.move(contents.connection, "new", "target").pending == 2
    contents.register(_destination("later.example", name="target"))
    assert {row.recipients for row in listed_copies.waiting(contents.connection, "target")} == {BOTH}
    assert {row.id for row in listed_copies.waiting(contents.connection, "target")} == {old, new}


# The product ----------------------------------------------------------------------------------------------------


def _settings(backup: ScriptedServer, *domains: str) -> str:
    listed = f"domains = {json.dumps(domains)}" if domains else ""
    return f'[[backup]]\nname = "new"\nurl = "smtp://{backup.address}"\n{listed}\n'


def _change(product: Product, text: str) -> None:
    Path(product.directory, "settings.toml").write_text(text, "utf-8")


@pytest.mark.parametrize(
    ("before", "after", "owed"),
    [
        (("x.example",), ("y.example",), BOTH[:1]),
        (("x.example",), (), BOTH[:1]),
        ((), ("y.example",), BOTH),
        (("x.example", "y.example"), ("z.example",), BOTH),
    ],
)
def test_what_waits_goes_to_whom_it_was_promised(
    product: Make,
    primary: ScriptedServer,
    backup: ScriptedServer,
    before: tuple[str, ...],
    after: tuple[str, ...],
    owed: tuple[str, ...],
) -> None:
    """Copies that a restart with another `domains` finds waiting are neither dropped nor sent to others."""
    backup.replies["MAIL"] = "451 4.3.2 not now"
    shadow = product(primary=primary.address, settings=SETTINGS, files={"settings.toml": _settings(backup, *before)})
    shadow.send("a@example.com", *BOTH, data=b"Subject: 1\r\n\r\n")
    wait_until(lambda: shadow.summary()["retrying"], message="not deferred")
    shadow.stop()
    _change(shadow, _settings(backup, *after))
    backup.replies.clear()
    shadow.start()
    (copy,) = backup.wait_for(1)
    assert tuple(copy.recipients) == owed
    wait_until(lambda: shadow.summary()["pending"] == 0, message="not settled")
    assert shadow.summary()["delivered"] == 1


def test_what_was_spooled_goes_to_whom_it_was_promised(
    product: Make, primary: ScriptedServer, backup: ScriptedServer, redis_factory: Callable[..., object]
) -> None:
    """A message that is accepted without Redis is imported under other settings, with the promise in its file."""
    server = redis_factory()
    relay = product(
        primary=primary.address,
        command="relay",
        redis_url=server.url,
        settings=SETTINGS,
        files={"settings.toml": _settings(backup, "x.example")},
    )
    server.stop()
    assert re.match("250", relay.send("a@example.com", *BOTH, data=b"Subject: 1\r\n\r\n"))
    relay.stop()
    _change(relay, _settings(backup, "y.example"))
    server.start()
    with relay.sibling("up"):
        (copy,) = backup.wait_for(1)
    assert copy.recipients == [BOTH[0]]
