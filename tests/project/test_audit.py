"""The soak's audit: a run without fault passes, and each kind of tampering is named."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from relay.mail.ids import IdSource, made_at

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # bench is no part of the wheel

from bench import audit, numbered  # noqa: E402 - found by the path above
from bench.disturbances import Disturbance  # noqa: E402 - as above

PRIMARY, PLAIN, REFUSING = "127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3"


@dataclass
class Taken:
    """A message that a server has taken."""

    number: int
    name: str
    mask: int
    digest: str
    recipients: list[str]
    corrupt: bool = False

    def line(self) -> str:
        words = [1000, self.number, self.mask, self.name, self.digest, ",".join(self.recipients)]
        return ("corrupt " if self.corrupt else "") + " ".join(map(str, words))


@dataclass
class Outcome:
    """What a run has left: to be tampered with, then audited."""

    promises: list[str] = field(default_factory=list)
    servers: dict[str, list[Taken]] = field(default_factory=lambda: {PRIMARY: [], PLAIN: [], REFUSING: []})
    failed: list[dict[str, object]] = field(default_factory=list)
    log: list[dict[str, str]] = field(default_factory=list)
    primaries: list[tuple[float, str]] = field(default_factory=lambda: [(0.0, PRIMARY)])
    calm: float = float("inf")

    def say(self, event: str, name: str, destination: str = "", reason: str = "") -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        fields = {"time": now, "level": "warning", "event": event, "id": name, "reason": reason}
        self.log.append({**fields, **({"destination": destination} if destination else {})})

    def of(self, server: str, number: int) -> Taken:
        return next(taken for taken in self.servers[server] if taken.number == number)

    def again(self, server: str, number: int, name: str = "") -> None:
        """Have a server take once more what it has taken, under its id or another."""
        taken = self.of(server, number)
        self.servers[server].append(replace(taken, name=name or taken.name))

    def faults(self, folder: Path) -> list[str]:
        (folder / "accepted").write_text("".join(f"{line}\n" for line in self.promises))
        (folder / "log").write_text("".join(json.dumps(line) + "\n" for line in self.log))
        files = {address: folder / f"server-{n}" for n, address in enumerate(self.servers)}
        for address, path in files.items():
            path.write_text("".join(taken.line() + "\n" for taken in self.servers[address]), "utf-8")
        records = audit.Records(
            accepted=folder / "accepted",
            servers=files,
            primaries=self.primaries,
            log=folder / "log",
            refusing=frozenset({REFUSING}),
            failed=self.failed,
            done=[Disturbance(0.0, "everything killed")],
            calm=self.calm,
        )
        return audit.examine(records).faults


def refused(number: int) -> list[int]:
    return [i for i in range(len(numbered.compose(number).recipients)) if numbered.is_refused(number, i)]


def first(condition: Callable[[int], bool]) -> int:
    return next(n for n in range(3000) if condition(n))


# A number of each kind that the tampering needs.
ORDINARY = first(lambda n: len(numbered.compose(n).recipients) == 2 and not refused(n))
ONE_REFUSED = first(lambda n: len(refused(n)) == 1 and len(numbered.compose(n).recipients) == 2)
ALL_REFUSED = first(numbered.refuses_message)
NUMBERS = (ORDINARY, ONE_REFUSED, ALL_REFUSED)


@pytest.fixture
def run() -> Outcome:
    """A run without fault: messages taken by all, or refused by the third server and listed."""
    outcome, ids = Outcome(), IdSource()
    for number in NUMBERS:
        made, name = numbered.compose(number), ids.next()
        addresses = [address.decode() for address in made.recipients]
        everybody = range(len(addresses))
        outcome.promises.append(f"{number} {sum(1 << i for i in everybody)} {name}")
        for server, taken in outcome.servers.items():
            never = refused(number) if server == REFUSING else []
            kept = [i for i in everybody if i not in never]
            if kept:
                mask = sum(1 << i for i in kept)
                taken.append(Taken(number, name, mask, made.digest, [addresses[i] for i in kept]))
            if never:
                row = {"destination": server, "id": name, "recipients": [addresses[i] for i in never]}
                outcome.failed.append(row)
    return outcome


def test_a_run_without_fault(run: Outcome, tmp_path: Path) -> None:
    """What was accepted is everywhere or listed: nothing to say."""
    assert run.faults(tmp_path) == []


def lose(server: str) -> Callable[[Outcome], None]:
    return lambda run: run.servers[server].remove(run.of(server, ORDINARY))


def lose_recipient(run: Outcome) -> None:
    taken = run.of(PLAIN, ORDINARY)
    taken.mask, taken.recipients = 1, taken.recipients[:1]


def change_recipient(run: Outcome) -> None:
    run.of(PLAIN, ORDINARY).recipients[0] = "somebody@else.example"


def change(**changes: object) -> Callable[[Outcome], None]:
    """Have a backup get something else than was sent."""
    made = numbered.compose(ORDINARY)
    told = {"sender": made.sender, "parameters": made.parameters, "wire": made.wire, **changes}

    def tamper(run: Outcome) -> None:
        run.of(PLAIN, ORDINARY).digest = numbered.digest(**told)

    return tamper


def swap_ids(run: Outcome) -> None:
    one, other = run.of(PLAIN, ORDINARY), run.of(PLAIN, ONE_REFUSED)
    one.name, other.name = other.name, one.name


def repeat(times: int, lines: int, *, at: str = PLAIN, said_of: str = PLAIN) -> Callable[[Outcome], None]:
    def tamper(run: Outcome) -> None:
        for _ in range(times):
            run.again(at, ORDINARY)
        for _ in range(lines):
            run.say("may repeat", run.of(at, ORDINARY).name, said_of)

    return tamper


def stranger(run: Outcome) -> None:
    run.again(PLAIN, ORDINARY, IdSource().next())


def resent(run: Outcome) -> None:
    run.again(PRIMARY, ORDINARY, IdSource().next())


def corrupt(run: Outcome) -> None:
    run.of(REFUSING, ORDINARY).corrupt = True


def unlisted(run: Outcome) -> None:
    run.failed.clear()


def listed_too_much(run: Outcome) -> None:
    made = numbered.compose(ONE_REFUSED)
    run.failed[0]["recipients"] = [address.decode() for address in made.recipients]


def listed_elsewhere(run: Outcome) -> None:
    run.failed.append({"destination": PLAIN, "id": run.of(PLAIN, ORDINARY).name, "recipients": ["n1.0@soak.example"]})


def delivered_though_refused(run: Outcome) -> None:
    run.servers[REFUSING].append(replace(run.of(PLAIN, ALL_REFUSED)))


def lose_promise_to_primary_refused(run: Outcome) -> None:
    """The primary refused a recipient, and a backup has got it all the same."""
    run.of(PRIMARY, ORDINARY).mask = 1
    run.of(PRIMARY, ORDINARY).recipients.pop()
    run.promises[0] = run.promises[0].replace(" 3 ", " 1 ")


def undeserved(run: Outcome) -> None:
    run.promises.append("refused 550 5.7.1 no")


def net(run: Outcome) -> None:
    name = run.of(PLAIN, ORDINARY).name
    run.calm = made_at(name)
    run.say("requeued", name, PLAIN)


def reversed_roles(run: Outcome) -> None:
    """Had the second server been the primary, what came to it twice would have been the product's own doing."""
    run.primaries = [(0.0, PLAIN)]
    repeat(1, 1)(run)


TAMPERING: dict[str, tuple[Callable[[Outcome], None], str]] = {
    "a copy is lost": (lose(PLAIN), f"lost at {PLAIN}"),
    "a message is lost at the primary": (lose(PRIMARY), f"lost at {PRIMARY}"),
    "a copy is lost at who refuses others": (lose(REFUSING), f"lost at {REFUSING}"),
    "a recipient is lost": (lose_recipient, f"lost at {PLAIN}"),
    "a recipient is changed": (change_recipient, "other than what was sent"),
    "the sender is changed": (change(sender=b"other@soak.example"), "other than what was sent"),
    "a parameter is lost": (change(parameters=(b"BODY=BINARYMIME",)), "other than what was sent"),
    "a header field is changed": (
        change(wire=numbered.compose(ORDINARY).wire.replace(b"X-Odd:", b"X-Odd: ", 1)),
        "other than what was sent",
    ),
    "a dot is lost in the body": (
        change(wire=numbered.compose(ORDINARY).wire.replace(b"\r\n..", b"\r\n.", 1)),
        "other than what was sent",
    ),
    "a checksum is wrong": (corrupt, f"corrupt at {REFUSING}"),
    "two messages exchange their ids": (swap_ids, "ids of one message on another"),
    "a duplicate without a line": (repeat(1, 0), "without a reason in the log for each time"),
    "two duplicates with one line": (repeat(2, 1), "without a reason in the log for each time"),
    "a duplicate with another backup's line": (repeat(1, 1, said_of=REFUSING), "without a reason in the log"),
    "an id twice at the primary": (repeat(1, 1, at=PRIMARY, said_of=""), "ids came to their primary twice"),
    "a number twice at the primary unasked": (resent, "more often than their client sent them"),
    "a copy of what the primary never took": (stranger, "of what its primary never took"),
    "a copy for whom the primary refused": (lose_promise_to_primary_refused, "for recipients whom the primary refused"),
    "a refusal is not listed": (unlisted, "not on the failed list"),
    "a refusal is listed for too many": (listed_too_much, "with other recipients than it refuses"),
    "a failure that nobody caused": (listed_elsewhere, "with other recipients than it refuses"),
    "delivered though refused": (delivered_though_refused, "which refuses them"),
    "5xx for nothing": (undeserved, "5xx for mail that nobody refused"),
    "the net was needed in the calm": (net, "needed repair though all was well"),
    "twice at who was the primary then": (reversed_roles, "ids came to their primary twice"),
}


@pytest.mark.parametrize("kind", TAMPERING)
def test_tampering_is_seen(run: Outcome, tmp_path: Path, kind: str) -> None:
    """Each way in which a product could be wrong is a fault, and is named."""
    tamper, wanted = TAMPERING[kind]
    tamper(run)
    faults = run.faults(tmp_path)
    assert any(wanted in fault for fault in faults), faults


@pytest.mark.parametrize(
    "allowed",
    [
        repeat(2, 2),
        lambda run: (run.promises.append(f"unanswered {ORDINARY} 3"), resent(run)),
    ],
    ids=["each duplicate has its line", "the client sent it again"],
)
def test_what_has_its_reason_is_no_fault(run: Outcome, tmp_path: Path, allowed: Callable[[Outcome], object]) -> None:
    """Duplicates are counted, not forbidden."""
    allowed(run)
    assert run.faults(tmp_path) == []


def test_an_uncertain_copy_has_its_reason_in_the_log(run: Outcome, tmp_path: Path) -> None:
    """A copy of what the primary never took is explained by `uncertain`, and by nothing else."""
    name = IdSource().next()
    run.again(PLAIN, ORDINARY, name)
    run.say("uncertain", name)
    assert run.faults(tmp_path) == []


@pytest.mark.parametrize("event", ["copy lost", "body missing", "session error"])
def test_what_the_log_must_not_say(run: Outcome, tmp_path: Path, event: str) -> None:
    """Some lines are faults by themselves."""
    run.say(event, "x")
    assert run.faults(tmp_path) == [f"1 times in the log: {event}"]


def test_what_a_soak_sends_has_it_all() -> None:
    """Among the numbers are 8-bit text, SMTPUTF8, the null sender, BDAT, dots, several recipients and large mail."""
    mails = [numbered.compose(n) for n in range(600)]
    assert any(b"SMTPUTF8" in mail.parameters for mail in mails)
    assert any(mail.parameters == (b"BODY=8BITMIME",) for mail in mails)
    assert any(not mail.sender for mail in mails)
    assert any(mail.is_chunked for mail in mails)
    assert any(len(mail.recipients) == 3 for mail in mails)
    assert max(len(mail.wire) for mail in mails) > 200_000
    for mail in mails[:50]:
        assert mail.wire.endswith(b"\r\n")
        assert b"\r\n.\r\n" not in mail.wire
        assert mail.unstuffed.replace(b"\r\n.", b"\r\n..") == mail.wire
