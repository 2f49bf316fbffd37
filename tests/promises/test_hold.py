"""An operator holds a backup of a running product, under load, and lets it go: nothing is lost, nothing is given up."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable

import pytest
import redis

from relay.command.main import run
from relay.ledger import keys
from support.product import SOON, Product
from support.scripted_server import ScriptedServer
from support.waiting import wait_until

WAITS = SOON


@pytest.fixture
def running(product: Callable[..., Product], primary: ScriptedServer, backup: ScriptedServer) -> Product:
    """A product with the backup `new`."""
    return product(primary=primary.address, files={
        "settings.toml": f'[[backup]]\nname = "new"\nurl = "{backup.address}"\n'
    })  # fmt: skip


def test_a_held_backup_gets_nothing_until_it_is_released(running: Product, backup: ScriptedServer) -> None:
    """Mail goes on; copies wait, across a kill -9 of the worker; all of it is seen, and all of them arrive."""
    running.send("from@example.com", "first@example.com")
    wait_until(lambda: len(backup.messages) == 1)
    (told,) = running.json("hold", "new", "--reason", "maintenance", "--until-released")
    assert (told["held"], told["until"], told["reason"]) == ("new", None, "maintenance")
    assert told["messages_a_second"] >= 0
    running.wait_for_log("destination held")
    for n in range(20):
        running.send("from@example.com", f"later-{n}@example.com")
    row = running.summary()
    assert (row["state"], row["held"], row["pending"]) == ("held", True, 20)
    assert "maintenance" in row["reason"]
    assert running.metric("smtpdup_held", destination="new") == 1
    status, text = running.get("/readyz")
    assert status == 200
    assert [w for w in json.loads(text)["warnings"] if w.startswith("destination new: held")]
    worker = running.child(_worker_name(running))
    os.kill(worker.pid, signal.SIGKILL)
    wait_until(lambda: running.log.count("destination held") == 2, message=lambda: running.log[-3000:])
    assert len(backup.messages) == 1
    assert running.json("release", "new") == [{"released": "new", "was_held": True}]
    wait_until(lambda: running.summary()["pending"] == 0, message=lambda: running.log[-3000:])
    assert len(backup.messages) == 21
    assert running.run("release", "new").returncode == 1
    assert running.summary()["state"] == "ok"
    commands = [act["command"] for act in running.json("audit")]
    assert commands[:2] == ["release new", "hold new"]


def _worker_name(instance: Product) -> str:
    (name,) = set(re.findall(r"(\S*new\S*) started as process", instance.log.replace('"', " ")))
    return str(name)


def test_a_hold_with_an_end_ends_by_itself(running: Product, backup: ScriptedServer) -> None:
    """Nobody releases it: the copies go out, and the log says why."""
    running.run("hold", "new", "--reason", "a moment", "--for", "2s")
    running.send("from@example.com", "to@example.com")
    wait_until(lambda: len(backup.messages) == 1)
    running.wait_for_log("the hold has ended")


def test_a_throttle_is_set_shown_and_taken_off(running: Product, backup: ScriptedServer) -> None:
    """Its bounds stand in the summary; what waits goes at once when it is off."""
    running.run("throttle", "new", "--rate", "4/h")
    (bounds,) = running.json("throttle", "new")
    assert bounds == {"destination": "new", "rate": pytest.approx(4 / 3600), "connections": None}
    with redis.Redis.from_url(running.redis_url) as client:
        wait_until(lambda: client.hlen(keys.THROTTLED + "new"))  # the worker has seen it
    for n in range(5):
        running.send("from@example.com", f"to-{n}@example.com")
    assert "throttled to" in running.summary()["reason"]
    assert len(backup.messages) <= 1
    running.run("throttle", "new", "--off")
    wait_until(lambda: len(backup.messages) == 5)


@pytest.mark.parametrize(
    "words",
    [
        ["hold", "new", "--until-released"],
        ["hold", "new", "--reason", "x"],
        ["hold", "new", "--reason", " ", "--until-released"],
        ["hold", "new", "--reason", "x", "--for", "1h", "--until-released"],
        ["hold", "new", "--reason", "x", "--for", "soon"],
        ["throttle", "new", "--rate", "fast"],
        ["throttle", "new", "--rate", "0"],
        ["throttle", "new", "--connections", "0"],
        ["throttle", "new", "--off", "--rate", "1/s"],
    ],
    ids=" ".join,
)
def test_what_cannot_be_meant(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Status 2 and one line, before anything is asked."""
    assert run(words) == 2
    assert capsys.readouterr().err.startswith("smtp-dup: ")
