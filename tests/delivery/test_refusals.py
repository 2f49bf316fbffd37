"""A server that refuses some mail gets all the rest; one that refuses everything costs few copies, and is probed."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import redis

from relay.breaker import Breaker
from relay.ledger import keys
from relay.mail.reply import Reply
from support import listed_copies
from support.ledger_contents import Contents
from support.reactions import Close, Moment, Reaction, Reset, Silence
from support.running_courier import arrived, at_the_dot, at_work, named
from support.scripted_server import ScriptedServer
from support.waiting import until

UNKNOWN = "550 5.1.1 user unknown"
DENIED = "554 5.7.1 relaying denied"


@pytest.fixture
def contents(redis_client: redis.Redis, backup: ScriptedServer) -> Contents:
    made = Contents(redis_client, "new")
    made.register(backup.destination("new"))
    return made


KINDS: dict[str, tuple[str, Callable[[str], dict[str, Reaction]]]] = {
    "recipients": ("RCPT", lambda reply: {"RCPT": named("bad", reply)}),
    "senders": ("MAIL", lambda reply: {"MAIL": named("bad", reply)}),
    "messages": (".", lambda reply: {".": at_the_dot("bad", reply)}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reply", [UNKNOWN, DENIED, "550 no"])
async def test_a_burst_of_refusals_holds_up_nobody(
    contents: Contents, redis_url: str, backup: ScriptedServer, kind: str, reply: str
) -> None:
    """Sixty in a row that are refused, alike, are failed; what waits behind them arrives, without a pause."""
    bad = [contents.pending(f"bad{n}@test", sender=f"bad{n}@test") for n in range(60)]
    good = [contents.pending(f"good{n}@test", sender=f"s{n}@test") for n in range(60)]
    backup.replies.update(KINDS[kind][1](reply))
    async with at_work(redis_url, backup) as work:
        work.add(bad + good)
        await until(lambda: len(arrived(backup)) == len(good) and not contents.pending_ids())
        assert sorted(contents.failed_ids()) == sorted(bad)
    assert len(backup.messages) == len(good)


@pytest.mark.parametrize("reply", [UNKNOWN, DENIED])
async def test_a_retry_of_all_that_failed_holds_up_nobody(
    contents: Contents, redis_url: str, redis_client: redis.Redis, backup: ScriptedServer, reply: str
) -> None:
    """An operator's retry of 150 copies that are still refused is over soon; new mail behind it does not wait."""
    bad = [contents.failed(f"bad{n}@test") for n in range(150)]
    backup.replies["RCPT"] = named("bad", reply)
    async with at_work(redis_url, backup) as work:
        work.add([contents.pending(f"known{n}@test") for n in range(30)])
        await until(lambda: len(arrived(backup)) == 30)
        assert listed_copies.retry(redis_client, bad) == 150
        for job, ids in contents.queued().items():
            work.add(ids, job)
        await until(lambda: len(contents.failed_ids()) < 150)
        work.add([contents.pending(f"known{n}@test") for n in range(30)])
        await until(lambda: len(backup.messages) == 60)


async def test_everything_refused_costs_few_copies(contents: Contents, redis_url: str, backup: ScriptedServer) -> None:
    """Relaying denied to all: twenty copies fail, then one for each probe; the first that is taken ends the pause."""
    ids = [contents.pending(f"b{n}@test", sender=f"s{n}@test") for n in range(300)]
    backup.replies["RCPT"] = DENIED
    async with at_work(redis_url, backup) as work:
        work.add(ids)
        await until(lambda: not work.courier.accepting)
        await until(lambda: len(contents.failed_ids()) == 20)  # written a little later
        await until(lambda: len(contents.failed_ids()) > 21)  # each probe is another copy
        assert len(contents.failed_ids()) < 25
        backup.replies.clear()
        await until(lambda: not contents.pending_ids())
    assert len(backup.messages) + len(contents.failed_ids()) == len(ids)


async def test_a_retry_ends_a_long_pause(
    contents: Contents, redis_url: str, redis_client: redis.Redis, backup: ScriptedServer
) -> None:
    """A server that has refused everything so far is probed when an operator retries; new mail arrives soon."""
    bad = [contents.pending(f"bad{n}@test") for n in range(150)]
    backup.replies["RCPT"] = named("bad", UNKNOWN)
    async with at_work(redis_url, backup) as work:
        work.add(bad)
        await until(lambda: redis_client.hget(keys.HEALTH + "new", "state") == b"paused")
        breaker = work.courier._breaker
        await until(lambda: breaker.probe_at - breaker.clock() > 3)
        breaker.probe_at += 600
        assert listed_copies.retry(redis_client, listed_copies.EVERY) >= 100
        for job, ids in contents.queued().items():
            work.add(ids, job)
        work.add([contents.pending(f"good{n}@test") for n in range(100)])
        await until(lambda: len(arrived(backup)) == 100, 20, lambda: f"{len(arrived(backup))} came")


async def test_a_probe_is_unlike_what_was_refused(contents: Contents, redis_url: str, backup: ScriptedServer) -> None:
    """A domain that the server does not take fills the queue: mail for another one is found behind it."""
    bad = [contents.pending(f"b{n}@bad.test", sender=f"s{n}@test") for n in range(400)]
    good = [contents.pending(f"g{n}@good.test") for n in range(10)]
    backup.replies["RCPT"] = named("@bad.test", DENIED)
    async with at_work(redis_url, backup) as work:
        work.add(bad + good)
        await until(lambda: len(arrived(backup)) == len(good))
        assert set(contents.failed_ids()) <= set(bad)


async def test_a_server_that_answers_otherwise_is_not_paused(
    contents: Contents, redis_url: str, backup: ScriptedServer
) -> None:
    """Deferrals of all kinds, as many as may be, stop nothing: they are about recipients."""
    bad = [contents.pending(f"bad{n}@test") for n in range(150)]
    good = [contents.pending(f"good{n}@test") for n in range(30)]
    replies = ["450 4.2.0 greylisted", "452 4.2.2 mailbox full", "451 4.7.1 later", "450 no"]
    backup.replies["RCPT"] = lambda moment: random.choice(replies) if "bad" in moment.line else None
    async with at_work(redis_url, backup) as work:
        work.add(bad + good)
        await until(lambda: len(arrived(backup)) == len(good))
        await until(lambda: sorted(contents.pending_ids()) == sorted(bad))
        assert work.courier.accepting


@pytest.mark.parametrize("command", ["MAIL", "RCPT", "DATA", "."])
@pytest.mark.parametrize("reaction", [("421 4.3.2 not now", Close()), Close(), "530 5.7.0 log in first"])
async def test_trouble_with_one_message_is_that_message_s(
    contents: Contents, redis_url: str, backup: ScriptedServer, command: str, reaction: Reaction
) -> None:
    """One at which the server says 421, or closes, is deferred when others go through; all of those arrive."""
    bad = contents.pending("a@test", sender="bad@test")
    good = [contents.pending(f"good{n}@test") for n in range(60)]
    backup.replies[command] = at_the_dot("bad", reaction) if command != "MAIL" else named("bad", reaction)
    async with at_work(redis_url, backup) as work:
        work.add([bad, *good])
        await until(lambda: len(arrived(backup)) == len(good))
        await until(lambda: redis_has_state(contents, bad))
        await until(lambda: work.courier.accepting)
        assert contents.state(bad).attempts >= 1
    assert len(backup.messages) == len(good)


@pytest.mark.parametrize(
    ("command", "reaction"),
    [
        ("MAIL", ("421 4.7.0 too many of you", Close())),
        ("MAIL", Close()),
        ("MAIL", "530 5.7.0 log in first"),
        ("RCPT", ("421 4.7.0 too many of you", Close())),
        ("RCPT", Close()),
        ("RCPT", "530 5.7.0 log in first"),
        ("DATA", Reset()),
        (".", ("451 4.3.0 no", Close())),
        (".", Close()),
    ],
)
async def test_trouble_with_many_messages_is_theirs(
    contents: Contents, redis_url: str, backup: ScriptedServer, command: str, reaction: Reaction
) -> None:
    """A burst at which the server says 421, or closes, holds up nobody for more than a pause or two."""
    bad = [contents.pending(f"a{n}@test", sender=f"bad{n}@test") for n in range(60)]
    good = [contents.pending(f"good{n}@test") for n in range(80)]
    backup.replies[command] = at_the_dot("bad", reaction) if command != "MAIL" else named("bad", reaction)
    async with at_work(redis_url, backup) as work:
        work.add(bad + good)
        await until(lambda: len(arrived(backup)) == len(good), message=lambda: f"{len(arrived(backup))} came")
        await until(lambda: set(bad) == set(contents.pending_ids()))
    assert len(backup.messages) == len(good)


async def test_a_server_that_breaks_off_with_everybody_is_paused(
    contents: Contents, redis_url: str, redis_client: redis.Redis, backup: ScriptedServer
) -> None:
    """Trouble with a few copies in a row is the server's: they wait for it, and it is probed."""
    ids = [contents.pending(f"b{n}@test") for n in range(100)]
    backup.replies["RCPT"] = Close()
    async with at_work(redis_url, backup) as work:
        work.add(ids)
        await until(lambda: not work.courier.accepting)
        assert len(backup.transactions) <= 4
        backup.replies.clear()
        await until(lambda: not contents.pending_ids())
    assert len(backup.messages) == len(ids)
    assert not redis_client.hlen(keys.OWN + "new")


async def test_what_comes_later_ends_a_long_pause(contents: Contents, redis_url: str, backup: ScriptedServer) -> None:
    """Behind hundreds that are refused, a single message that is taken is found by one of the next two probes."""
    asked: list[str] = []

    def answer(moment: Moment) -> Reaction:
        asked.append(moment.line)
        return DENIED if "bad" in moment.line else None

    backup.replies["RCPT"] = answer
    async with at_work(redis_url, backup) as work:
        work.add([contents.pending(f"bad{n}@d{n}.test", sender=f"s{n}@s{n}.test") for n in range(400)])
        await until(lambda: not work.courier.accepting)
        good = contents.pending("good@d.test", sender="s@s.test", age=0)
        before = len(asked)
        work.add([good])
        await until(lambda: good not in contents.pending_ids())
    # A refusal on a kept connection is asked about once more on a new one; the first of the two may be under way.
    assert next(n for n, line in enumerate(asked) if "good" in line) <= before + 6
    assert arrived(backup) == {"good@d.test"}


async def test_one_copy_alone_meets_trouble(contents: Contents, redis_url: str, backup: ScriptedServer) -> None:
    """With no other copy to ask with, a server that breaks off is paused at once, and asked again later."""
    contents.pending("a@test")
    backup.replies["RCPT"] = Close()
    async with at_work(redis_url, backup) as work:
        work.add(contents.pending_ids())
        await until(lambda: not work.courier.accepting)
        assert len(backup.transactions) == 1
        backup.replies.clear()
        await until(lambda: not contents.pending_ids())


@pytest.mark.parametrize("code", ["550 5.1.1 unknown", "554 5.7.1 denied"])
async def test_what_was_said_before_the_end_of_the_connection_counts(
    contents: Contents, redis_url: str, backup: ScriptedServer, code: str
) -> None:
    """A recipient that was refused is failed, whatever comes of the connection; the others get the copy."""
    alone = [contents.pending(f"bad{n}@test") for n in range(5)]
    mixed = contents.pending("bad@test", "good@test")
    backup.replies["RCPT"] = named("bad", (code, Close()))
    async with at_work(redis_url, backup, retry_first="0.2") as work:
        work.add([*alone, mixed])
        await until(lambda: sorted(contents.failed_ids()) == sorted([*alone, mixed]))
        (job,) = await until(contents.queue().scheduled_job_registry.get_job_ids)
        work.add([mixed], job)
        await until(lambda: not contents.pending_ids())
    assert [message.recipients for message in backup.messages] == [["good@test"]]


async def test_who_was_answered_at_the_dot_gets_no_second_copy(
    contents: Contents, redis_url: str, backup: ScriptedServer
) -> None:
    """An LMTP server that ends between two of its replies to the dot: only those without one are owed the copy."""
    backup.lmtp = True
    message_id = contents.pending("one@test", "two@test", "three@test")
    backup.replies[".<two@test>"] = "550 5.7.1 not here"
    backup.replies[".<three@test>"] = Close()
    async with at_work(redis_url, backup) as work:
        work.add([message_id])
        await until(lambda: redis_has_state(contents, message_id))
        assert contents.state(message_id).owed == (2,)
        assert contents.failed_ids() == [message_id]


def redis_has_state(contents: Contents, message_id: str) -> bool:
    return bool(contents.connection.hexists(keys.OWN + "new", message_id)) and not contents.connection.zcard(
        keys.BUSY + "new"
    )


async def test_refused_at_mail_and_closed(contents: Contents, redis_url: str, backup: ScriptedServer) -> None:
    """A server that refuses a sender and closes has said no to that copy."""
    bad = [contents.pending("a@test", sender="bad@test") for _ in range(3)]
    backup.replies["MAIL"] = named("bad", ("550 5.7.1 not you", Close()))
    async with at_work(redis_url, backup) as work:
        work.add([*bad, contents.pending("good@test")])
        await until(lambda: len(contents.failed_ids()) == 3 and not contents.pending_ids())
    assert arrived(backup) == {"good@test"}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("lmtp", [False, True])
async def test_any_mixture(contents: Contents, redis_url: str, backup: ScriptedServer, seed: int, lmtp: bool) -> None:
    """Good and bad in any order: all good ones arrive once, soon; each bad one is failed or deferred."""
    backup.lmtp = lmtp
    chance = random.Random(seed)
    kinds: dict[str, Reaction] = {
        "gone": UNKNOWN,
        "denied": DENIED,
        "plain": "550 no such user here",
        "full": "452 4.2.2 full",
        "busy": ("421 4.3.2 not for you", Close()),
        "shut": Close(),
        "mute": Silence(),
    }

    def answer(moment: Moment) -> Reaction:
        return next((reaction for kind, reaction in kinds.items() if kind in moment.line), None)

    backup.replies["RCPT"] = answer
    names = [chance.choice(["gone", "denied", "plain", "full"]) for _ in range(120)] + ["busy", "shut", "mute"]
    names += ["good"] * 120
    chance.shuffle(names)
    if seed == 0:
        names.sort(key=lambda name: name == "good")  # the bad ones first
    ids = {contents.pending(f"{name}{n}@test", sender=f"s{n}@test"): name for n, name in enumerate(names)}
    async with at_work(redis_url, backup, relay_timeout_seconds="2") as work:
        work.add(list(ids))
        await until(lambda: len(arrived(backup)) == 120, 30, lambda: str(len(arrived(backup))))

        def ended() -> bool:
            """Whether each bad one has: who meets trouble last of all may be taken for the server's."""
            deferred = contents.connection.hkeys(keys.OWN + "new")
            left = {ids[i] for i in contents.pending_ids() if i.encode() not in deferred}
            return left <= {"busy", "shut", "mute"}

        await until(ended, 30)
        assert {ids[i] for i in contents.pending_ids()} <= {"full", "busy", "shut", "mute"}
        assert {ids[i] for i in contents.failed_ids()} <= {"gone", "denied", "plain"}
    assert len(backup.messages) == 120


def refusal(text: str) -> Reply:
    return Reply.of(int(text[:3]), text[4:])


@pytest.mark.parametrize(
    ("replies", "count"),
    [
        ([DENIED], 20),
        ([UNKNOWN], 100),
        (["550 <{n}@test>: no relay to you"], 20),
        (["554 5.7.1 <{n}@test>: denied"], 20),
        (["552 5.3.4 too big"], 100),
        ([DENIED, UNKNOWN], 0),
    ],
)
def test_how_many_refusals_it_takes(replies: list[str], count: int) -> None:
    """The same reply, whatever address it quotes, again and again, the last times for what was chosen otherwise."""
    breaker = Breaker(20)
    for number in range(1, 300):
        breaker.refuses(refusal(replies[number % len(replies)].format(n=number)), is_look=breaker.is_in_doubt)
        if breaker.is_open:
            break
    assert (number if breaker.is_open else 0) == count


def test_a_doubt_that_was_wrong_makes_the_next_one_late() -> None:
    """A server that takes mail in between gets twice the benefit each time, for some minutes; never without an end."""
    now = [0.0]
    breaker = Breaker(20, clock=lambda: now[0])

    def refused_until_paused() -> int:
        for number in range(1, 2000):
            breaker.refuses(refusal(DENIED), is_look=breaker.is_in_doubt)
            if breaker.is_open:
                return number
        return 0

    counts = []
    for _ in range(8):
        counts.append(refused_until_paused())
        breaker.took()
        breaker.works()
    assert counts == [20, 40, 80, 160, 320, 640, 640, 640]
    now[0] += 601
    assert refused_until_paused() == 20


def test_nobody_is_to_blame_without_a_look() -> None:
    """However many are refused: while nothing else was tried, nothing is known of the server."""
    breaker = Breaker(20)
    for _ in range(500):
        breaker.refuses(refusal(DENIED))
    assert breaker.is_in_doubt
    assert not breaker.is_open
    breaker.took()
    assert not breaker.is_in_doubt
