"""The promise of the backup leg: exactly the right recipients get the copy once; the rest is retried or listed."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest

from support.product import QUICK, SOON, Product
from support.reactions import Close, Delay, Gate, Reset
from support.scripted_server import ScriptedServer
from support.waiting import wait_until

WAITS = SOON

Make = Callable[..., Product]


@pytest.fixture
def pair(product: Make, primary: ScriptedServer, backup: ScriptedServer) -> Product:
    """The whole product between one primary and one backup, with quick retries."""
    return product(primary=primary.address, backups=[backup.address], settings=QUICK)


def settled(product: Product) -> bool:
    row = product.summary()
    return bool(row["pending"] == 0 and row["retrying"] == 0)


def test_deferred_then_taken(product: Make, primary: ScriptedServer, backup: ScriptedServer) -> None:
    """A copy that is deferred waits in the queue, visibly, and is delivered at a later try."""
    patient = {**QUICK, "retry.first": "2", "retry.longest": "2"}
    pair = product(primary=primary.address, backups=[backup.address], settings=patient)
    backup.replies["."] = ["451 4.7.1 come back later", "451 4.7.1 come back later", None]
    pair.send("a@example.com", "b@example.com", data=b"Subject: grey\r\n\r\n")
    rows: list[dict[str, object]] = []

    def is_deferred() -> bool:
        rows[:] = pair.json("queue", "list")
        return bool(rows and rows[0]["attempts"] and rows[0]["next_attempt_at"])  # not while it is tried

    wait_until(is_deferred, message="not deferred")
    (row,) = rows
    assert row["destination"] == backup.address
    assert row["sender"] == "a@example.com"
    assert row["recipients"] == ["b@example.com"]
    assert row["last_reply"] == "451 4.7.1 come back later"
    assert row["next_attempt_at"]
    backup.wait_for(1, timeout=30)
    wait_until(lambda: settled(pair), message="not settled")
    assert pair.summary()["delivered"] == 1
    assert len(backup.messages) == 1


def test_each_recipient_by_its_own_answer(pair: Product, backup: ScriptedServer) -> None:
    """One of three deferred, one refused: the third gets it at once, the second later, the refused one is listed."""
    backup.replies["RCPT TO:<grey@"] = ["450 4.2.1 greylisted", None]
    backup.replies["RCPT TO:<no@"] = "550 5.1.1 unknown user"
    with pair.dialogue() as client:
        client.hello()
        client.mail("a@example.com", "yes@example.com", "grey@example.com", "no@example.com", data=b"x\r\n")
    first, second = backup.wait_for(2, timeout=30)
    assert first.recipients == ["yes@example.com"]
    assert second.recipients == ["grey@example.com"]
    (row,) = pair.json("failed", "list")
    assert row["recipients"] == ["no@example.com"]
    assert row["reply"] == "550 5.1.1 unknown user"
    wait_until(lambda: settled(pair), message="not settled")
    assert len(backup.messages) == 2


def test_retry_of_a_failed_copy(pair: Product, backup: ScriptedServer) -> None:
    """`failed retry` sends to just the recipients refused; show, export and drop do what they say."""
    backup.replies["RCPT TO:<no@"] = ["550 5.1.1 unknown user", None]
    with pair.dialogue() as client:
        client.hello()
        client.mail("a@example.com", "yes@example.com", "no@example.com", data=b"Subject: hello\r\n\r\n.dot\r\n")
    wait_until(lambda: pair.json("failed", "list"), message="not in the failed list")
    message_id = pair.json("failed", "list")[0]["id"]
    assert "550 5.1.1 unknown user" in pair.run("failed", "show", message_id).stdout
    assert "Subject: hello\n\n.dot\n" in pair.run("failed", "export", message_id).stdout.replace("\r\n", "\n")
    assert pair.run("failed", "retry", message_id).returncode == 0
    copies = backup.wait_for(2, timeout=20)
    assert copies[1].recipients == ["no@example.com"]
    wait_until(lambda: settled(pair) and not pair.json("failed", "list"), message="not settled")
    with pair.dialogue() as client:
        backup.replies["RCPT TO:<no@"] = "550 5.1.1 unknown user"
        client.hello()
        client.mail("a@example.com", "no@example.com", data=b"x\r\n")
    wait_until(lambda: pair.json("failed", "list"), message="not in the failed list")
    assert pair.run("failed", "drop", "--all", "--yes").returncode == 0
    assert not pair.json("failed", "list")


def test_requeue_in_rq_is_failed_retry(pair: Product, backup: ScriptedServer) -> None:
    """What rq-dashboard's Requeue does has the same effect as `failed retry`."""
    import redis
    from rq.registry import FailedJobRegistry
    from rq.serializers import JSONSerializer

    backup.replies["."] = ["554 5.7.1 no", None]
    pair.send("a@example.com", "b@example.com", data=b"x\r\n")
    wait_until(lambda: pair.json("failed", "list"), message="not in the failed list")
    with redis.Redis.from_url(pair.redis_url) as connection:
        registry = FailedJobRegistry(f"backup-{backup.address}", connection=connection, serializer=JSONSerializer)
        (job_id,) = registry.get_job_ids()
        registry.requeue(job_id)
    backup.wait_for(1, timeout=20)
    wait_until(lambda: settled(pair) and not pair.json("failed", "list"), message="not settled")


def test_backup_down_and_back(pair: Product, primary: ScriptedServer, backup: ScriptedServer) -> None:
    """A backup that cannot be reached pauses it, burns no copy, delays no client; then all arrive once."""
    backup.down()
    for number in range(50):
        pair.send("a@example.com", "b@example.com", data=b"Subject: %d\r\n\r\n" % number)
    assert len(primary.messages) == 50
    wait_until(lambda: pair.summary()["pending"] == 50, message="not pending")
    wait_until(lambda: pair.json("queue", "list")[0]["last_reply"], message="no reason shown")
    assert all(row["attempts"] == 0 for row in pair.json("queue", "list"))
    backup.listen()
    pair.run("queue", "flush")
    copies = backup.wait_for(50, timeout=30)
    wait_until(lambda: settled(pair), message="not settled")
    assert sorted(int(c.header("Subject") or -1) for c in copies) == list(range(50))
    assert len(backup.messages) == 50


def test_one_dead_backup_does_not_delay_another(product: Make, primary: ScriptedServer, backup: ScriptedServer) -> None:
    """Each backup has its queue, its worker and its breaker."""
    dead = ScriptedServer()
    dead.start()
    dead.down()
    both = product(primary=primary.address, backups=[dead.address, backup.address], settings=QUICK)
    for _ in range(10):
        both.send("a@example.com", "b@example.com", data=b"x\r\n")
    backup.wait_for(10, timeout=10)
    wait_until(lambda: both.summary(backup.address)["pending"] == 0, message="not settled")
    assert both.summary(dead.address)["pending"] == 10
    dead.listen()
    dead.wait_for(10, timeout=30)
    dead.stop()


def test_worker_killed_with_copies_in_flight(pair: Product, backup: ScriptedServer) -> None:
    """SIGKILL of a worker mid-job: what was in flight goes out again within seconds, the others are not repeated."""
    for number in range(20):
        pair.send("a@example.com", "b@example.com", data=b"Subject: warm %d\r\n\r\n" % number)
    backup.wait_for(20, timeout=20)
    wait_until(lambda: settled(pair), message="not settled")
    gate = Gate()
    backup.replies["MAIL FROM:<slow@"] = (gate, None)
    for number in range(10):
        pair.send("slow@example.com", "b@example.com", data=b"Subject: slow %d\r\n\r\n" % number)
    wait_until(lambda: gate.reached, message="nothing in flight")
    (worker,) = _workers(pair)
    worker.kill()
    gate.open()
    copies = backup.wait_for(30, timeout=20)
    wait_until(lambda: settled(pair), message="not settled")
    subjects = [c.header("Subject") for c in backup.messages]
    assert set(subjects) == {f"warm {n}" for n in range(20)} | {f"slow {n}" for n in range(10)}
    assert all(subjects.count(f"warm {n}") == 1 for n in range(20))
    assert copies


def test_sigterm_gives_back_what_is_untried(pair: Product, backup: ScriptedServer) -> None:
    """A drain finishes what is in flight; the rest is delivered by the next start, once."""
    backup.replies["."] = (Delay(0.3), None)
    for number in range(60):
        pair.send("a@example.com", "b@example.com", data=b"Subject: %d\r\n\r\n" % number)
    assert pair.stop() == 0
    backup.replies.clear()
    pair.start()
    backup.wait_for(60, timeout=30)
    wait_until(lambda: settled(pair), message="not settled")
    assert sorted(int(m.header("Subject") or -1) for m in backup.messages) == list(range(60))


@pytest.mark.parametrize("reaction", ["421 4.3.2 no", Reset(), Close()])
def test_trouble_in_the_middle_burns_nothing(pair: Product, backup: ScriptedServer, reaction: object) -> None:
    """A backup that breaks off at RCPT for a while: the copies wait for it and arrive."""
    backup.replies["RCPT"] = reaction
    for _ in range(5):
        pair.send("a@example.com", "b@example.com", data=b"x\r\n")
    wait_until(lambda: pair.summary()["state"] == "paused", message="not paused")
    backup.replies.clear()
    backup.wait_for(5, timeout=30)
    wait_until(lambda: settled(pair), message="not settled")
    assert not pair.json("failed", "list")


def test_backup_that_refuses_everything_is_paused(pair: Product, backup: ScriptedServer) -> None:
    """The normal first day of a migration: after 20 equal refusals it is paused, not 100 copies dead."""
    backup.replies["RCPT"] = "550 5.7.1 relaying denied"
    with pair.dialogue() as client:
        client.hello()
        for number in range(100):
            client.mail("a@example.com", f"b{number}@example.com", data=b"x\r\n")
    wait_until(lambda: pair.summary()["state"] == "paused", message="not paused")
    row = pair.summary()
    assert 20 <= row["failed"] <= 25  # and one for each probe
    assert "relaying denied" in row["reason"]
    backup.replies.clear()
    assert pair.run("queue", "flush").returncode == 0
    assert pair.run("failed", "retry", "--all").returncode == 0
    backup.wait_for(100, timeout=30)
    wait_until(lambda: settled(pair) and not pair.json("failed", "list"), message="not settled")
    assert len(backup.messages) == 100


def test_too_many_recipients_for_one_transaction(pair: Product, backup: ScriptedServer) -> None:
    """452 after some recipients: the rest goes at once in another transaction."""
    count = {"n": 0}

    def limit(moment: object) -> object:
        count["n"] += 1
        return "452 4.5.3 too many recipients" if count["n"] > 3 else None

    def begin(moment: object) -> object:
        count["n"] = 0
        return None

    backup.replies["MAIL"] = begin
    backup.replies["RCPT"] = limit
    names = [f"r{n}@example.com" for n in range(8)]
    with pair.dialogue() as client:
        client.hello()
        client.mail("a@example.com", *names, data=b"x\r\n")
    wait_until(lambda: sum(len(m.recipients) for m in backup.messages) == 8, message="not all recipients")
    assert sorted(r for m in backup.messages for r in m.recipients) == names
    wait_until(lambda: settled(pair), message="not settled")


def test_greylisting_of_many(pair: Product, backup: ScriptedServer) -> None:
    """Everything greylisted once arrives once, at the second try."""
    backup.replies["RCPT"] = "450 4.2.0 greylisted"
    with pair.dialogue() as client:
        client.hello()
        for number in range(40):
            client.mail("a@example.com", f"b{number}@example.com", data=b"x\r\n")
    wait_until(lambda: pair.summary()["retrying"] == 40, message="not deferred")
    backup.replies.clear()
    backup.wait_for(40, timeout=30)
    wait_until(lambda: settled(pair), message="not settled")
    assert len(backup.messages) == 40


def test_given_up(product: Make, primary: ScriptedServer, backup: ScriptedServer) -> None:
    """A copy that is deferred until retry.give_up is in the failed list, with its history."""
    backup.replies["RCPT"] = "450 4.2.0 never"
    short = product(primary=primary.address, backups=[backup.address], settings={**QUICK, "retry.give_up": "4"})
    short.send("a@example.com", "b@example.com", data=b"x\r\n")
    wait_until(lambda: short.json("failed", "list"), message="not given up")
    (row,) = short.json("failed", "list")
    assert row["reply"] == "450 4.2.0 never"
    assert row["attempts"] >= 3


def test_backup_for_one_domain_only(product: Make, primary: ScriptedServer, backup: ScriptedServer) -> None:
    """Only recipients in `domains` are copied there."""
    shadow = product(
        primary=primary.address,
        settings=QUICK,
        files={
            "settings.toml": f"""
                [[backup]]
                name = "shadow"
                url = "smtp://{backup.address}"
                domains = ["new.example"]
            """
        },
    )
    with shadow.dialogue() as client:
        client.hello()
        client.mail("a@example.com", "x@old.example", data=b"Subject: old\r\n\r\n")
        client.mail("a@example.com", "x@old.example", "y@new.example", data=b"Subject: both\r\n\r\n")
    (copy,) = backup.wait_for(1)
    assert copy.recipients == ["y@new.example"]
    wait_until(lambda: shadow.summary("shadow")["pending"] == 0, message="not settled")
    assert len(backup.messages) == 1


def test_sigterm_exits_zero(pair: Product) -> None:
    """A drain with nothing to do is quick and clean."""
    assert pair.stop() == 0
    assert "Traceback" not in pair.log


def test_second_signal_ends_at_once(pair: Product, backup: ScriptedServer) -> None:
    """Who cannot wait says so twice."""
    gate = Gate()
    backup.replies["MAIL"] = (gate, None)
    pair.send("a@example.com", "b@example.com", data=b"x\r\n")
    wait_until(lambda: gate.reached, message="nothing in flight")
    assert pair.process is not None
    pair.process.send_signal(signal.SIGTERM)
    pair.wait_for_log("stopping")
    pair.process.send_signal(signal.SIGTERM)
    assert pair.wait(timeout=5) != 0
    gate.open()


def _workers(pair: Product) -> list:
    """The worker processes: those that talk to RQ under a worker's name."""
    import redis

    with redis.Redis.from_url(pair.redis_url) as connection:
        names = [name.decode() for name in connection.smembers("rq:workers")]
    pids = {int(name.rsplit(".", 2)[1]) for name in names}
    return [child for child in pair.children() if child.pid in pids]
