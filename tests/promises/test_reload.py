"""New settings without a restart: nothing is lost, nobody is refused, and with a fault nothing changes."""

from __future__ import annotations

import re
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Self

import pytest

from support.dialogue import Unexpected
from support.product import Product
from support.reactions import Gate, Silence
from support.retrying_sender import Sender, message
from support.scripted_server import ScriptedServer
from support.waiting import wait_until

Make = Callable[..., Product]
QUICK = {"retry.first": "1", "retry.longest": "2", "workers.sweep": "1"}


def toml(primary: str, backups: dict[str, str], **options: object) -> str:
    """Return a settings file; ``smtp__max_recipients=1`` is an option."""
    lines = [f'[relay]\ndestination_primary = "{primary}"']
    for key, value in options.items():
        section, _, name = key.partition("__")
        text = f'"{value}"' if isinstance(value, str) else str(value).lower()
        lines.append(f"[{section}]\n{name} = {text}" if section != "relay" else f"{name} = {text}")
    lines.sort(key=lambda line: line.startswith("["))  # those of [relay] follow its heading
    head = next(line for line in lines if line.startswith("[relay]"))
    lines.remove(head)
    tables = [f'[[backup]]\nname = "{name}"\nurl = "{url}"' for name, url in backups.items()]
    return "\n".join([head, *lines, *tables]) + "\n"


@pytest.fixture
def configured(product: Make) -> Iterator[Callable[..., Product]]:
    """Call it for a Product with a settings file, which ``rewrite`` replaces."""

    def make(primary: str, backups: dict[str, str], *, settings: dict[str, str] | None = None, **rest: str) -> Product:
        return product(files={"settings.toml": toml(primary, backups)}, settings={**QUICK, **(settings or {})}, **rest)

    return make


def rewrite(product: Product, primary: str, backups: dict[str, str], **options: object) -> None:
    (product.directory / "settings.toml").write_text(toml(primary, backups, **options))


def reload(product: Product, *words: str, status: int = 0) -> subprocess.CompletedProcess[str]:
    done = product.run("reload", *words, timeout=90)
    assert done.returncode == status, f"{done.returncode}\n{done.stdout}{done.stderr}\n{product.log[-3000:]}"
    return done


def pids(product: Product, name: str) -> list[int]:
    """Return the processes that a child of this name has had, the first first."""
    return [int(pid) for pid in re.findall(rf"\b{name} started as process (\d+)", product.log)]


def numbers(server: ScriptedServer) -> Counter[int]:
    found = (re.search(rb"Subject: (\d+)", taken.body) for taken in server.messages)
    return Counter(int(match[1]) for match in found if match)


class Newcomers:
    """Clients that come one after the other, each with one message; every one of them must be served at once."""

    def __init__(self, product: Product) -> None:
        self._product = product
        self._stop = threading.Event()
        self.troubles: list[str] = []
        self.sent: list[int] = []
        self._thread = threading.Thread(target=self._come, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(60)

    def _come(self) -> None:
        number = 100_000
        while not self._stop.is_set():
            number += 1
            try:
                with self._product.dialogue() as client:
                    client.hello()
                    client.mail("a@example.com", f"n{number}@example.com", data=message(number))
            except (OSError, Unexpected) as error:
                self.troubles.append(f"{number}: {type(error).__name__}: {error}")
            else:
                self.sent.append(number)


@pytest.mark.parametrize("times", [3, pytest.param(10, marks=pytest.mark.long)])
def test_reloads_under_load(configured: Make, primary: ScriptedServer, backup: ScriptedServer, times: int) -> None:
    """Whoever connects is served, whoever has a connection may be asked to come again; each message arrives once."""
    up = configured(primary.address, {"new": backup.address}, settings={"smtp.processes": "2"})
    sender = Sender(up.smtp_port, range(1000), sessions=3, patience=300).start()
    with Newcomers(up) as newcomers:
        for n in range(times):
            before = len(newcomers.sent)
            rewrite(up, primary.address, {"new": backup.address}, smtp__max_recipients=900 + n)
            assert f"Generation {n + 2}:" in reload(up, "--wait", "60s").stdout
            wait_until(lambda before=before: len(newcomers.sent) > before)
        sender.stop()
        sender.join()
    assert newcomers.troubles == [], [line for line in up.log.splitlines() if "451" in line or '"warning"' in line]
    sent = sender.accepted | set(newcomers.sent)
    assert len(newcomers.sent) >= times
    wait_until(lambda: set(numbers(backup)) >= sent, message=lambda: f"missing {sent - set(numbers(backup))}")
    assert {n: c for n, c in numbers(primary).items() if c > 1} == {}
    assert {n: c for n, c in numbers(backup).items() if c > 1} == {}
    wait_until(lambda: up.summary()["pending"] == 0)
    wait_until(
        lambda: sum(e.get("event") == "relay stopped" for e in up.events) == 2 * times, message=lambda: up.log[-2000:]
    )
    assert up.metric("smtpdup_clients") == 0
    assert up.metric("smtpdup_messages_total", result="accepted") == len(numbers(primary))
    assert up.stop() == 0


def test_with_a_fault_nothing_changes(configured: Make, primary: ScriptedServer, backup: ScriptedServer) -> None:
    """Every fault is told, with where it stands; SIGHUP has them in one line of the log; nobody hears of it."""
    up = configured(primary.address, {"new": backup.address})
    before = [child.pid for child in up.children()]
    rewrite(up, primary.address, {"new": backup.address}, smtp__max_recipients="many", smpt__domain="x")
    done = reload(up, status=2)
    assert "smtp.max_recipients: expected" in done.stderr
    assert "smpt.domain: unknown option" in done.stderr
    assert "Nothing has changed." in done.stdout
    (told,) = [e for e in up.events if e["event"] == "not reloaded"]
    assert up.process
    up.process.send_signal(signal.SIGHUP)
    wait_until(lambda: [e["reason"] for e in up.events if e["event"] == "not reloaded"] == [told["reason"]] * 2)
    assert [child.pid for child in up.children()] == before
    (up.directory / "settings.toml").write_text("[smtp\n")
    assert "cannot be read" in reload(up, status=2).stderr
    rewrite(up, primary.address, {"new": backup.address}, smtp__users_file=str(up.directory / "none"))
    assert "smtp.users_file" in reload(up, status=2).stderr
    assert [child.pid for child in up.children()] == before
    up.send("a@example.com", "b@example.com")
    backup.wait_for(1)


def test_what_takes_a_restart_is_named_and_left(
    configured: Make, primary: ScriptedServer, backup: ScriptedServer
) -> None:
    """The rest is taken, checked with what stays as it is; a dry run says the same and does nothing."""
    up = configured(primary.address, {"new": backup.address}, settings={"redis.timeout_seconds": ""})
    rewrite(up, primary.address, {"new": backup.address}, redis__timeout_seconds=4, smtp__max_recipients=7)
    dry = reload(up, "--dry-run")
    assert "takes a restart: redis.timeout_seconds (5 -> 4)" in dry.stdout
    assert re.search(r"smtp\.max_recipients +1000 +7", dry.stdout)
    assert "Nothing was done." in dry.stdout
    assert len(pids(up, "relay-1")) == 1
    rows = up.json("reload")
    assert {"kind": "takes_restart", "key": "redis.timeout_seconds"}.items() <= rows[1].items()
    assert rows[-1] == {"kind": "result", "role": "up", "generation": 2, "taken": True, "reason": ""}
    again = reload(up)
    assert "takes a restart: redis.timeout_seconds" in again.stdout
    assert "No other setting has changed." in again.stdout
    assert len(pids(up, "relay-1")) == 2


def test_a_transaction_ends_where_it_began(
    configured: Make, primary: ScriptedServer, backup: ScriptedServer, scripted: Callable[..., ScriptedServer]
) -> None:
    """A client in a transaction keeps limit and primary that it began with; a new one has the new ones at once."""
    other = scripted()
    up = configured(primary.address, {"new": backup.address})
    with up.dialogue() as old, up.dialogue() as early:
        old.hello()
        old.say("MAIL FROM:<a@example.com>", 250)
        old.say("RCPT TO:<b@example.com>", 250)
        rewrite(up, other.address, {"new": backup.address}, smtp__max_recipients=1)
        reload(up)
        old.say("RCPT TO:<c@example.com>", 250)
        with up.dialogue() as new:
            new.hello()
            new.say("MAIL FROM:<a@example.com>", 250)
            new.say("RCPT TO:<b@example.com>", 250)
            assert new.say("RCPT TO:<c@example.com>", 452)
            new.body(b"Subject: 2\r\n\r\nx\r\n")
        old.body(b"Subject: 1\r\n\r\nx\r\n")
        old.expect(421)
        early.hello()  # who came before, and has sent nothing yet, may
        early.mail("a@example.com", "d@example.com", "e@example.com", data=b"Subject: 3\r\n\r\nx\r\n")
        early.expect(421)
    assert set(numbers(primary)) == {1, 3}
    assert set(numbers(other)) == {2}
    wait_until(lambda: set(numbers(backup)) == {1, 2, 3})


def test_a_backup_comes_and_another_goes(
    configured: Make, primary: ScriptedServer, backup: ScriptedServer, scripted: Callable[..., ScriptedServer]
) -> None:
    """A new backup gets copies and a worker; what waits for one that is gone is delivered all the same."""
    late = scripted()
    up = configured(primary.address, {"old": backup.address})
    backup.down()
    up.send("a@example.com", "b@example.com", data=message(1))
    rewrite(up, primary.address, {"late": late.address})
    done = reload(up)
    assert re.search(r"backup\.late +none +smtp://127", done.stdout)
    assert "worker-late-1" in done.stdout
    up.send("a@example.com", "b@example.com", data=message(2))
    late.wait_for(1)
    assert set(numbers(late)) == {2}
    backup.listen()
    wait_until(lambda: set(numbers(backup)) == {1}, message=lambda: up.log[-3000:])
    assert up.summary("old")["pending"] == 0


def test_new_processes_that_are_killed_leave_all_as_it_was(
    configured: Make, primary: ScriptedServer, backup: ScriptedServer, scripted: Callable[..., ScriptedServer]
) -> None:
    """A new process that dies before all are ready ends the reload: the former never stopped serving."""
    silent = scripted({"CONNECT": Silence()})  # a relay process waits for its primary's EHLO before it is ready
    up = configured(primary.address, {"new": backup.address}, settings={"relay.timeout_seconds": "60"})
    rewrite(up, silent.address, {"new": backup.address})
    found: list[subprocess.CompletedProcess[str]] = []
    asking = threading.Thread(target=lambda: found.append(up.run("reload", "--wait", "60s", timeout=90)))
    asking.start()
    wait_until(lambda: len(pids(up, "relay-1")) == 2, message=lambda: up.log[-2000:])
    up.child("relay-1").kill()
    asking.join()
    assert found[0].returncode == 1, found[0]
    assert "nothing has changed: relay-1" in found[0].stderr
    assert "SIGKILL" in found[0].stderr
    up.send("a@example.com", "b@example.com")
    assert len(primary.messages) == 1
    backup.wait_for(1)
    rewrite(up, primary.address, {"new": backup.address}, smtp__max_recipients=5)
    assert "Generation 3:" in reload(up).stdout


def test_a_former_process_that_is_killed_loses_nothing(
    configured: Make, primary: ScriptedServer, backup: ScriptedServer
) -> None:
    """What a leaving relay process had staged when it was killed is taken over by its successor, and copied."""
    gate = Gate()
    up = configured(primary.address, {"new": backup.address}, settings={"relay.uncertain_hold": "1"})
    with up.dialogue(timeout=60) as client:
        client.hello()
        primary.replies["."] = (gate, None)
        client.say("MAIL FROM:<a@example.com>", 250)
        client.say("RCPT TO:<b@example.com>", 250)
        client.say("DATA", 354)
        client.raw(message(1) + b".\r\n")
        gate.wait()
        rewrite(up, primary.address, {"new": backup.address}, smtp__max_recipients=5)
        assert "former" in reload(up).stdout
        (former, _) = pids(up, "relay-1")
        next(child for child in up.children() if child.pid == former).kill()
        wait_until(client.is_closed)
    del primary.replies["."]
    gate.open()
    wait_until(lambda: set(numbers(backup)) == {1}, message=lambda: up.log[-3000:])


def test_two_at_once(configured: Make, primary: ScriptedServer, backup: ScriptedServer) -> None:
    """Reloads at the same time are one after the other, and the last one has what the file says."""
    up = configured(primary.address, {"new": backup.address})
    rewrite(up, primary.address, {"new": backup.address}, smtp__max_recipients=5)
    found: list[int] = []
    several = [
        threading.Thread(target=lambda: found.append(up.run("reload", "--wait", "60s", timeout=90).returncode))
        for _ in range(3)
    ]
    for one in several:
        one.start()
    for one in several:
        one.join()
    assert found == [0, 0, 0]
    assert len(pids(up, "relay-1")) == 2, "the second and the third found nothing left to do"
    (act,) = [row for row in up.json("audit") if row["command"] == "reload"]
    assert (act["before"], act["after"]) == ("smtp.max_recipients=1000", "smtp.max_recipients=5")
    assert act["who"]
    assert [e["generation"] for e in up.events if e["event"] == "reloaded"] == [2]


def test_a_stop_ends_a_reload(
    configured: Make, backup: ScriptedServer, primary: ScriptedServer, scripted: Callable[..., ScriptedServer]
) -> None:
    """A stop in the middle of a reload is a stop, of both generations."""
    silent = scripted({"CONNECT": Silence()})
    up = configured(primary.address, {"new": backup.address}, settings={"relay.timeout_seconds": "60"})
    rewrite(up, silent.address, {"new": backup.address})
    assert up.process
    up.process.send_signal(signal.SIGHUP)
    wait_until(lambda: len(pids(up, "relay-1")) == 2, message=lambda: up.log[-2000:])
    assert up.stop() == 0
    assert "it is being stopped" in up.log


def test_relay_and_workers_of_one_state_folder(
    product: Make, primary: ScriptedServer, backup: ScriptedServer, redis_url: str
) -> None:
    """`reload` reaches both, each with its settings; housekeeping goes on with one at a time."""
    file = {"settings.toml": toml(primary.address, {"new": backup.address})}
    relay = product(command="relay", redis_url=redis_url, files=file, settings=QUICK)
    workers = relay.sibling("workers").start()
    try:
        rewrite(relay, primary.address, {"new": backup.address}, retry__give_up="4d")
        done = reload(relay)
        assert done.stdout.count("retry.give_up") == 2
        assert "relay-1" in done.stdout
        assert "worker-new-1" in done.stdout
        relay.send("a@example.com", "b@example.com")
        backup.wait_for(1)
        assert relay.get("/readyz")[0] == workers.get("/readyz")[0] == 200
    finally:
        workers.clean_up()
    assert reload(relay).returncode == 0
    relay.stop()
    assert "nothing runs with the state folder" in reload(relay, status=1).stderr


def test_the_status_answers_throughout(configured: Make, primary: ScriptedServer, backup: ScriptedServer) -> None:
    """Every question to /healthz is answered while generations change."""
    up = configured(primary.address, {"new": backup.address})
    answers: list[int] = []
    over = threading.Event()

    def ask() -> None:
        while not over.is_set():
            answers.append(up.get("/healthz")[0])
            time.sleep(0.01)  # not to keep the processors from what is looked at

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        for n in range(3):
            rewrite(up, primary.address, {"new": backup.address}, smtp__max_recipients=900 + n)
            reload(up)
    finally:
        over.set()
        asking.join()
    assert set(answers) == {200}


def test_who_was_promoted_stays_it(configured: Make, primary: ScriptedServer, backup: ScriptedServer) -> None:
    """New settings change nothing about who answers; settings that do not name the one that does are a fault."""
    up = configured(primary.address, {"new": backup.address})
    done = up.run("promote", "new", "--force", "--reason", "a test", "--yes", timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    rewrite(up, primary.address, {"new": backup.address}, smtp__max_recipients=5)
    reload(up)
    up.send("a@example.com", "b@example.com", data=message(1))
    assert set(numbers(backup)) == {1}, "it answered"
    wait_until(lambda: set(numbers(primary)) == {1}, message=lambda: up.log[-3000:])
    rewrite(up, primary.address, {})
    assert "new was promoted" in reload(up, status=2).stderr
