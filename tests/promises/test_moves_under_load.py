"""A thousand mailboxes moved and moved back while mail comes in at several relays, some of them killed.

Each message is for a mailbox of its own. Whoever answers for it, both servers have it in the end, and only a crash or a
lost reply makes a message come twice.
"""

from __future__ import annotations

import itertools
import json
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from support.drained import is_drained
from support.product import Product
from support.redis_servers import RedisServer
from support.retrying_sender import Sender
from support.scripted_server import ScriptedServer
from support.waiting import wait_until

Make = Callable[..., Product]
USERS = 1000
_EVERY = 0.1  # seconds between two messages of a sender


def pace(senders: list[Sender], most: int, over: threading.Event) -> None:
    """Have messages begin one after the other, so that there are some at each of the moves, and the rest at the end."""
    for count in range(1, most):
        for sender in senders:
            sender.pause_at(count)
        if over.wait(_EVERY):
            break
    over.wait()
    for sender in senders:
        sender.pause_at(most)


@pytest.mark.parametrize(
    ("messages", "with_kills"),
    [pytest.param(90, False, id="short"), pytest.param(900, True, id="long", marks=pytest.mark.long)],
)
@pytest.mark.timeout(300)
def test_a_thousand_move_back_and_forth_under_load(
    messages: int,
    with_kills: bool,
    product: Make,
    scripted: Callable[..., ScriptedServer],
    redis_factory: Callable[..., RedisServer],
    tmp_path: Path,
) -> None:
    """Three hosts, four relay processes: nobody is ahead of anybody by more than one move, and nothing is lost."""
    old, new, server = scripted(), scripted(), redis_factory()
    common = {
        "primary": f"old={old.address}",
        "backups": [f"new={new.address}"],
        "redis_url": server.url,
        "settings": {"retry.first": "1", "retry.longest": "2", "relay.demoted": "sender=keep", "smtp.processes": "2"},
    }
    relays = [product(**common), *(product(command="relay", **common) for _ in range(2))]
    batch = tmp_path / "batch"
    batch.write_text("".join(f"r{n}@example.com\n" for n in range(USERS)))
    share = messages // len(relays)
    senders = [
        Sender(relay.smtp_port, range(n * share, (n + 1) * share), sessions=3, patience=150).start()
        for n, relay in enumerate(relays)
    ]
    statuses: list[int] = []
    over = threading.Event()
    pacing = threading.Thread(target=pace, args=(senders, share, over))
    pacing.start()
    turns = 8 if with_kills else 4
    for turn in range(turns):
        way = ["--to", "new"] if turn % 2 == 0 else ["--back"]
        if with_kills and turn == 3:
            relays[1].child("relay-1").kill()
        if with_kills and turn == 5:
            server.kill()
            done = relays[0].run("move", "--file", str(batch), *way, "--yes")
            assert done.returncode == 3, done.stdout + done.stderr
            server.restart()
        done = relays[0].run(
            "move", "--file", str(batch), *way, "--yes", "--force", "--note", "load", "--json", timeout=90
        )
        statuses.append(done.returncode)
        rows = {row["kind"]: row for line in done.stdout.splitlines() if (row := json.loads(line))}
        if done.returncode == 0:
            assert rows["moved"]["count"] == USERS
            assert rows["followed"]["late"] == []
            assert len(rows["followed"]["followed"]) >= 2 * len(relays) - 1
    assert statuses.count(0) >= (turns if not with_kills else turns - 3), statuses
    over.set()
    pacing.join()
    accepted = set(itertools.chain.from_iterable(sender.join() for sender in senders))
    assert len(accepted) == len(relays) * share
    wait_until(lambda: is_drained(relays[0]), 90)
    attempts = dict(itertools.chain.from_iterable(sender.attempts.items() for sender in senders))
    found = {
        name: Counter(int(t.header("Subject") or -1) for t in at.messages) for name, at in (("old", old), ("new", new))
    }
    for name, numbers in found.items():
        assert accepted <= set(numbers), f"lost at {name}: {sorted(accepted - set(numbers))[:10]}"
    events = [event for relay in relays for event in relay.events if event.get("event") == "accepted"]
    assert {event.get("primary") or "old" for event in events} == {"new", "old"}
    primaries = Counter(event["message_id"] for event in events)
    once = [number for number in accepted if attempts[number] == 1]
    assert all(primaries[f"<{number}@sender.example>"] == 1 for number in once)
    if not with_kills:
        assert all(numbers[number] == 1 for numbers in found.values() for number in once)
