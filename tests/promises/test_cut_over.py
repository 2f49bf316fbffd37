"""Parts restarted in any order, servers that trade places, leave or get another name: what was owed arrives there."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable

import pytest

from support.drained import is_drained
from support.product import QUICK, SOON, Product
from support.redis_servers import RedisServer
from support.retrying_sender import Sender
from support.scripted_server import ScriptedServer
from support.waiting import wait_until

SETTINGS = {
    **QUICK,
    "relay.timeout_seconds": "5",
    "relay.final_timeout_seconds": "10",
    "relay.uncertain_hold": "1",
    "redis.timeout_seconds": "2",
}
WAITS = SOON
LATER = {"RCPT": "451 4.7.1 later"}


def numbers(server: ScriptedServer) -> Counter[int]:
    return Counter(int(m.header("Subject") or -1) for m in server.messages)


def wait_for(server: ScriptedServer, wanted: set[int], product: Product) -> None:
    wait_until(
        lambda: wanted <= set(numbers(server)),
        80,
        lambda: f"missing: {sorted(wanted - set(numbers(server)))[:20]}\n{product.log[-3000:]}",
    )


def explained(server: ScriptedServer, primary: ScriptedServer, log: str) -> bool:
    """Say whether each copy beyond what the primary took has a line with its id in the log."""
    lines = [line for line in log.splitlines() if "may repeat" in line or "uncertain" in line]
    ids = {m.header("Subject"): m.wire.split(b" id ", 1)[1].split(b";", 1)[0].decode() for m in server.messages}
    at_primary = numbers(primary)
    more = [n for n, count in numbers(server).items() if count > at_primary[n]]
    return all(any(ids[str(n)] in line for line in lines) for n in more)


@pytest.mark.timeout(180)
def test_parts_restarted_in_any_order(
    product: Callable[..., Product],
    primary: ScriptedServer,
    backup: ScriptedServer,
    redis_factory: Callable[..., RedisServer],
) -> None:
    """Relay, workers and Redis of their own, each stopped or killed and started in turn under load: nothing is lost."""
    server = redis_factory()
    relay = product(
        command="relay", primary=primary.address, backups=[backup.address], redis_url=server.url, settings=SETTINGS
    )
    workers = relay.sibling("workers")
    source = random.Random(3)
    sender = Sender(relay.smtp_port, range(100_000), patience=120).start()
    try:
        workers.start()
        for _ in range(3):
            order: list[Product | RedisServer] = [relay, workers, server]
            source.shuffle(order)
            for part in order:
                before = len(sender.accepted)
                source.choice([part.stop, part.kill])()
                part.start() if part is server else part.start(wait=False)
                wait_until(lambda before=before: len(sender.accepted) > before + 20)
        sender.stop()
        accepted = sender.join()
        wait_until(lambda: is_drained(relay), 60, lambda: f"not drained: {relay.log[-3000:]}")
        assert accepted <= set(numbers(primary))
        assert accepted <= set(numbers(backup))
        assert explained(backup, primary, relay.log + workers.log)
        assert relay.stop() == workers.stop() == 0
    finally:
        workers.clean_up()


@pytest.mark.timeout(120)
def test_primary_and_backup_trade_places(
    product: Callable[..., Product], scripted: Callable[..., ScriptedServer]
) -> None:
    """Under traffic, with copies pending: they still go to where they are owed, once, and new mail the other way."""
    old, new = scripted(), scripted(LATER)
    pair = product(primary=old.address, backups=[new.address], settings=SETTINGS)
    sender = Sender(pair.smtp_port, range(100_000), patience=90).start()
    wait_until(lambda: len(sender.accepted) > 100)
    assert pair.stop() == 0
    owed, before = set(numbers(old)), numbers(new)
    assert not before
    new.replies.clear()
    pair.settings |= {"relay.destination_primary": new.address, "relay.destination_backups": old.address}
    pair.start()
    pair.wait_for_log("no backup any more, but copies are left")
    wait_until(lambda: len(sender.accepted) > len(owed) + 100)
    sender.stop()
    accepted = sender.join()
    wait_for(new, accepted | owed, pair)
    wait_for(old, accepted, pair)
    wait_until(lambda: is_drained(pair))
    # What a client sends again because its connection ended counts for both; nothing else comes twice.
    again = {number for number, count in sender.attempts.items() if count > 1}
    assert {n for n, count in (numbers(new) + numbers(old)).items() if count > 2} <= again
    assert pair.stop() == 0


@pytest.mark.timeout(120)
def test_what_is_no_longer_configured_is_drained(
    product: Callable[..., Product], primary: ScriptedServer, scripted: Callable[..., ScriptedServer]
) -> None:
    """A backup that is taken out of the settings gets what it is owed and nothing new; start and commands say so."""
    stays, goes = scripted(), scripted(LATER)
    pair = product(primary=primary.address, backups=[stays.address, goes.address], settings=SETTINGS)
    assert Sender(pair.smtp_port, range(50)).start().join() == set(range(50))
    assert pair.stop() == 0
    pair.settings["relay.destination_backups"] = stays.address
    pair.start()
    pair.wait_for_log("no backup any more, but copies are left")
    assert pair.summary(goes.address)["pending"] == 50
    assert goes.address in pair.run("check").stdout
    assert Sender(pair.smtp_port, range(50, 80)).start().join() == set(range(50, 80))
    goes.replies.clear()
    wait_for(goes, set(range(50)), pair)
    wait_for(stays, set(range(80)), pair)
    wait_until(lambda: pair.summary(goes.address)["pending"] == 0)
    assert numbers(goes) == Counter(range(50))
    assert numbers(stays) == Counter(range(80)) == numbers(primary)


@pytest.mark.timeout(120)
def test_what_comes_later_for_a_backup_that_was_removed(
    product: Callable[..., Product], primary: ScriptedServer, scripted: Callable[..., ScriptedServer]
) -> None:
    """Copies that become due while it runs, here by `failed retry`, get a worker; it ends when they are gone, twice."""
    stays, goes = scripted(), scripted({".": "550 5.7.1 not now"})
    pair = product(primary=primary.address, backups=[stays.address, goes.address], settings=SETTINGS)
    assert Sender(pair.smtp_port, range(6)).start().join() == set(range(6))
    wait_until(lambda: pair.summary(goes.address)["failed"] == 6)
    pair.settings["relay.destination_backups"] = stays.address
    assert pair.stop() == 0
    pair.start()
    worker = f"worker-{goes.address}-1"
    ids = [row["id"] for row in pair.json("failed", "list")]
    goes.replies.clear()
    started = pair.log.count(f"{worker} started")
    for batch in (ids[:3], ids[3:]):
        assert pair.run("failed", "retry", *batch).returncode == 0
        wait_until(lambda: not pair.summary(goes.address)["pending"] and len(numbers(goes)) % 3 == 0)
        started += 1
        wait_until(lambda n=started: pair.log.count(f"{worker} started") == n)
        wait_until(lambda n=started: pair.log.count("it was not needed any more") == n - 1)
        assert not pair.children(re.escape(worker))
    assert numbers(goes) == Counter(range(6))
    assert pair.stop() == 0


@pytest.mark.timeout(120)
def test_a_renamed_backup(product: Callable[..., Product], primary: ScriptedServer, backup: ScriptedServer) -> None:
    """``queue move OLD NEW`` gives all that waits under the old name to the new one, while the server is away."""
    table = '[[backup]]\nname = "{}"\nurl = "smtp://{}"\n'
    backup.down()
    pair = product(
        primary=primary.address, settings=SETTINGS, files={"settings.toml": table.format("old", backup.address)}
    )
    assert Sender(pair.smtp_port, range(250)).start().join() == set(range(250))
    wait_until(lambda: pair.summary("old")["state"] == "paused")
    assert pair.stop() == 0
    (pair.directory / "settings.toml").write_text(table.format("new", backup.address))
    pair.start()
    assert Sender(pair.smtp_port, range(250, 300)).start().join() == set(range(250, 300))
    wait_until(lambda: pair.summary("old")["state"] == "paused")
    moved = Counter[str]()
    wait_until(lambda: moved.update(pair.json("queue", "move", "old", "new")[0]) or not pair.summary("old")["pending"])
    assert (moved["pending"], moved["covered"]) == (250, 0)
    assert pair.summary("new")["pending"] == 300
    backup.listen()
    pair.run("queue", "flush")
    wait_for(backup, set(range(300)), pair)
    wait_until(lambda: is_drained(pair))
    assert numbers(backup) == Counter(range(300))
