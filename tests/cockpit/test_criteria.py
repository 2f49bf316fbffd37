"""Each criterion passes, fails, warns or does not know by its rule, and says so with the numbers that count."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.cockpit.criteria import CRITERIA
from relay.cockpit.evidence import (
    Deferrals,
    Domain,
    Evidence,
    Missing,
    OpenGroup,
    Refusals,
    Relay,
    Restraint,
)
from relay.cockpit.finding import Finding, Result
from relay.cockpit.readiness import judge
from relay.config.model import ReadySettings
from relay.ledger.divergence_groups import Outage
from relay.ledger.flow import Buckets, DestinationFlow, Flow
from relay.ledger.greetings import Greeting
from relay.ledger.hosts import Host, Reach
from relay.ledger.overview import Summary
from relay.ledger.probe_evidence import ProbeEvidence
from relay.mail.destination import Destination

NOW = 1_795_796_640.0
DAY = 86400.0
HOUR = 3600
PASS, WARN, FAIL, UNKNOWN = Result.PASS, Result.WARN, Result.FAIL, Result.UNKNOWN
QUICK = Buckets({0.1: 100})
COPIES = DestinationFlow(delivered=10, seconds=QUICK, age=QUICK)


def hours(days: float, *, accepted: int = 10, copies: DestinationFlow | None = COPIES) -> list[Flow]:
    """The hours of so many days, the last one not over."""
    begin = int(NOW - days * DAY) // HOUR * HOUR
    seen = {"new": copies} if copies else {}
    return [
        Flow(start, HOUR, accepted=accepted, largest=5_000_000, most=50, seconds=QUICK, destinations=seen)
        for start in range(begin, int(NOW) + 1, HOUR)
    ]


def reach(place: str, name: str = "new", **values: Any) -> Reach:
    given: dict[str, Any] = {
        "ok": True, "text": "", "gave_mail": True, "verified": True, "why_unverified": "",
        "certificate_ends": NOW + 90 * DAY, "age": 10.0, **values,
    }  # fmt: skip
    return Reach(name, place, place, **given)


def host(place: str = "a", role: str = "up", **values: Any) -> Host:
    given: dict[str, Any] = {"processes": 3, "spool_messages": 0, "spool_oldest_s": 0.0, "age": 5.0, **values}
    return Host(place, place, role, **given)


OFFERS = {"SIZE": "50000000", "8BITMIME": "", "SMTPUTF8": "", "DSN": "", "PIPELINING": ""}
READY = Evidence(
    name="new",
    old="old",
    now=NOW,
    ready=ReadySettings(probe_age=0.0, arrived_age=0.0),
    destination=Destination("new", "localhost", 25),
    first=NOW - 8 * DAY,
    hours=hours(8),
    day=Flow(NOW - DAY, DAY, accepted=240, seconds=QUICK, destinations={"new": COPIES}),
    summary=Summary("new", 0, 0.0, 0, 0, 100),
    domains={"a.example": Domain(20, 0)},
    old_greeting=Greeting(OFFERS, True, NOW),
    new_greeting=Greeting(OFFERS, True, NOW),
    relays=[Relay("a/1", 0.5, True, 1, 1), Relay("a/2", 0.5, True, 1, 1)],
    hosts=[host()],
    reaches=[reach("a")],
    old_reaches=[reach("a", "old")],
)


def with_rules(**rules: Any) -> Evidence:
    return replace(READY, ready=replace(READY.ready, **rules))


def with_ehlo(new: dict[str, str], old: dict[str, str] | None = None, **flow: Any) -> Evidence:
    """The new server offers just this, and mail seen was like that."""
    seen = [replace(READY.hours[0], largest=1, most=1, **flow)] if flow else READY.hours
    greeting = Greeting(OFFERS if old is None else old, True, NOW)
    return replace(READY, new_greeting=Greeting(new, True, NOW), old_greeting=greeting, hours=seen)


def without(name: str) -> dict[str, str]:
    return {key: value for key, value in OFFERS.items() if key != name}


def found(number: int, evidence: Evidence) -> Finding | None:
    (criterion,) = [c for c in CRITERIA if c.number == number]
    return criterion.judge(evidence)


def but(**values: Any) -> Evidence:
    """All is well but for this."""
    return replace(READY, **values)


def probed(age: float = HOUR, **found: Any) -> Evidence:
    """A probe of recipients that the primary takes came to this, some time ago."""
    known = ProbeEvidence(NOW - age, "me", "list", **{"domains": 2 if found else 0, **found})
    return replace(with_rules(probe_age=7 * DAY), probed=[known])


def both(listed: Evidence, seen: Evidence) -> Evidence:
    """Two probes: of a list, and of whom mail came for."""
    return replace(listed, probed=[*listed.probed, *seen.probed])


def refusals(age: float = HOUR, **found: Any) -> Evidence:
    """And one of those that it refuses."""
    return replace(with_rules(probe_age=7 * DAY), probed_refusals=ProbeEvidence(NOW - age, "me", "trace", **found))


def relay(label: str, generation: int = 1, epoch: int = 1, **values: Any) -> Relay:
    return Relay(label, **{"age": 0.5, "is_alive": True, "trouble": "", **values}, generation=generation, epoch=epoch)


LATE = DestinationFlow(age=Buckets({1.0: 90, 900.0: 10}))
SLOW = DestinationFlow(delivered=10, seconds=Buckets({1.0: 100}))
ANSWERED = {"old": Buckets({0.05: 100}), "a": Buckets({1.0: 50, 0.5: 50}), "b": Buckets({1.0: 50})}
BY_SERVER = replace(READY.day, destinations={"new": SLOW}, answered=ANSWERED)
HALF = [h if n < 24 else replace(h, destinations={}) for n, h in enumerate(hours(8))]
BUSY_MONDAY = [replace(h, accepted=1000) if h.start % (7 * DAY) == 9 * HOUR else h for h in hours(10)]
UNSEEN_MONDAY = [h if h.accepted == 10 else replace(h, destinations={}) for h in BUSY_MONDAY]
NOT_RECORDED = Missing("nobody counts")

CASES: Sequence[tuple[int, Evidence, Result, str]] = [
    (1, READY, PASS, "watched for 8 d, 7 d wanted"),
    (1, but(first=NOW - 2 * DAY - 4 * HOUR), FAIL, "watched for 2 d 4 h of 7 d"),
    (1, but(first=NOW - 7 * DAY), PASS, ""),
    (1, but(first=None), FAIL, "no copy"),
    (2, READY, PASS, "wanted"),
    (2, but(hours=hours(8, copies=DestinationFlow(delivered=2))), FAIL, "338 messages in 7 d, 1,000 wanted"),
    (2, but(hours=hours(8, copies=DestinationFlow(failed=10))), PASS, ""),
    (2, but(hours=hours(8, copies=DestinationFlow(deferred=99))), FAIL, "0 messages"),
    (2, replace(with_rules(days=0), hours=hours(34, copies=DestinationFlow(delivered=2))), PASS, "in 35 d"),
    (3, READY, PASS, ""),
    (3, but(hours=BUSY_MONDAY), PASS, "has been seen"),
    (3, but(hours=UNSEEN_MONDAY), FAIL, "your busiest hour, has not been seen"),
    (3, but(hours=hours(8, accepted=0)), UNKNOWN, "not known"),
    (4, READY, PASS, "nothing"),
    (4, but(refusals=NOT_RECORDED), UNKNOWN, "nobody counts"),
    (4, but(refusals=Refusals([OpenGroup("550 5.1.1 no such mailbox", 10), OpenGroup("552 full", 2)])), FAIL,
     "12 recipients in 2 groups: 550 5.1.1 no such mailbox (10), 552 full (2); `smtp-dup divergence`"),
    (4, but(refusals=Refusals([OpenGroup("550 no", 0)], 7)), PASS, "7 groups acknowledged"),
    (4, replace(with_rules(max_open=5), refusals=Refusals([OpenGroup("550 no", 5)])), WARN, "ready.max_open allows 5"),
    (4, replace(with_rules(max_open=5), refusals=Refusals([OpenGroup("550 no", 6)])), FAIL, "6 recipients in 1 group"),
    (5, READY, PASS, "nothing is put off for over an hour"),
    (5, but(deferrals=NOT_RECORDED), UNKNOWN, "nobody counts"),
    (5, but(deferrals=Deferrals(open=10, seen=500)), FAIL, "10 recipients put off for over an hour, 2.0 %"),
    (5, but(deferrals=Deferrals(open=9, seen=10)), WARN, "9 recipients"),
    (5, but(deferrals=Deferrals(open=10, seen=1000)), WARN, ""),
    (5, but(deferrals=Deferrals(delivered=32, seen=1000)), WARN,
     "3.2 % put off at first (greylisting?), delivered soon after"),
    (6, READY, PASS, "0 copies wait"),
    (6, but(summary=Summary("new", 3, 840.0, 0, 0, 1)), FAIL, "oldest waits 14 m, 3 copies wait"),
    (6, but(summary=Summary("new", 3, 60.0, 0, 0, 1)), PASS, ""),
    (6, but(summary=None), UNKNOWN, "new"),
    (6, but(day=Flow(0, DAY, destinations={"new": LATE})), FAIL,
     "1 of 100 copies"),
    (7, READY, PASS, "not paused for 1 d"),
    (7, but(outages=NOT_RECORDED), UNKNOWN, "nobody counts"),
    (7, but(outages=[Outage(NOW - 6 * HOUR, NOW - 5 * HOUR, "connection refused")] * 3), FAIL,
     "paused 3 times, 3 h in all, last 5 h ago: connection refused"),
    (7, but(outages=[Outage(NOW - 3 * DAY, NOW - 2 * DAY, "refused")]), PASS, ""),
    (7, but(outages=[Outage(NOW - 3 * DAY, 0.0, "refused")]), FAIL, "last now: refused"),
    (7, but(summary=Summary("new", 1, 1.0, 0, 0, 0, "paused", "timed out")), FAIL, "paused now: timed out"),
    (7, replace(with_rules(calm=0.0), outages=[Outage(NOW - 60, NOW - 1, "x")]), PASS, ""),
    (8, READY, PASS, ""),
    (8, but(restraint=Restraint(held="by alice since 10:02")), FAIL, "held by alice since 10:02"),
    (8, but(restraint=Restraint(throttled="to 5/s")), FAIL, "throttled to 5/s"),
    (8, but(destination=Destination("new", "h", 25, sender="null")), WARN, "null sender"),
    (8, but(destination=Destination("new", "h", 25, soft_bounce=True)), WARN, "soft_bounce"),
    (8, but(destination=None), UNKNOWN, ""),
    (9, READY, PASS, ""),
    (9, but(day=replace(READY.day, destinations={"new": SLOW})), FAIL, "new within 950 ms, old 95 ms"),
    (9, but(day=replace(READY.day, destinations={"new": replace(SLOW, seconds=Buckets({0.5: 9}))})), PASS, ""),
    (9, but(day=replace(READY.day, seconds=Buckets({1.0: 9}), destinations={"new": SLOW})), PASS, ""),
    (9, but(day=replace(READY.day, destinations={})), UNKNOWN, "no reply of new"),
    (9, but(day=replace(READY.day, seconds=Buckets())), UNKNOWN, "no reply of old"),
    (9, but(day=BY_SERVER), FAIL, "old 48 ms"),
    (9, but(day=BY_SERVER, compared=("a", "b")), PASS, "a, b 96"),
    (9, but(day=BY_SERVER, compared=("c",)), UNKNOWN, "no reply of c"),
    (10, READY, PASS, ""),
    (10, but(new_greeting=None), UNKNOWN, "no EHLO of new"),
    (10, but(old_greeting=None), UNKNOWN, "no EHLO of old"),
    (10, with_ehlo({**OFFERS, "SIZE": "10000000"}), FAIL, "SIZE 10.0 MB, old takes 50.0 MB"),
    (10, with_ehlo({**OFFERS, "SIZE": "10000000"}, without("SIZE")), FAIL, "old names no limit"),
    (10, with_ehlo({**OFFERS, "SIZE": "4000000"}, {**OFFERS, "SIZE": "1000"}), FAIL, "a message of 5.0 MB was seen"),
    (10, with_ehlo({**OFFERS, "SIZE": "0"}), PASS, ""),
    (10, with_ehlo({**OFFERS, "SIZE": "lots" * 99}), PASS, ""),
    (10, with_ehlo(without("SMTPUTF8")), PASS, ""),
    (10, with_ehlo(without("SMTPUTF8"), uses={"SMTPUTF8": 3}), FAIL, "SMTPUTF8 is missing, 3 messages needed it"),
    (10, with_ehlo(without("8BITMIME"), uses={"8BITMIME": 1}), FAIL, "8BITMIME is missing, 1 message needed it"),
    (10, with_ehlo(without("DSN"), uses={"DSN": 1}), FAIL, "DSN"),
    (10, with_ehlo({**OFFERS, "LIMITS": "RCPTMAX=20"}), FAIL, "RCPTMAX 20, a message to 50 recipients was seen"),
    (10, with_ehlo({**OFFERS, "LIMITS": "RCPTMAX=50"}), PASS, ""),
    (10, but(new_greeting=Greeting(OFFERS)), FAIL, "STARTTLS is missing, old has it"),
    (10, but(new_greeting=Greeting({**OFFERS, "STARTTLS": ""})), PASS, ""),
    (10, but(reaches=[reach("a", verified=False, why_unverified="self-signed")]), WARN, "self-signed"),
    (10, but(reaches=[reach("a", certificate_ends=NOW + 12 * DAY)]), WARN, "ends in 12 d"),
    (11, READY, PASS, "1 domain"),
    (11, but(domains=NOT_RECORDED), UNKNOWN, "nobody counts"),
    (11, but(domains={"a.example": Domain(0, 10), "b.example": Domain(1, 99)}), FAIL,
     "1 of 2 domains never reached new: a.example"),
    (11, but(domains={"a.example": Domain(0, 9)}), UNKNOWN, "nothing seen yet"),
    (11, but(domains={}), UNKNOWN, "nothing seen yet: no copy has been delivered to new"),
    (11, but(domains={"a.example": Domain(1, 0), "b.example": Domain(0, 9)}), PASS,
     "mail for 1 domain has reached new; too few messages for 1 more to tell"),
    (4, but(first=None), UNKNOWN, "nothing seen yet"),
    (5, but(first=None), UNKNOWN, "nothing seen yet"),
    (11, but(destination=Destination("new", "h", 25, domains=("a.example",))), FAIL, "1 domain by its settings"),
    (12, with_rules(probe_age=7 * DAY), UNKNOWN, "never probed: `smtp-dup probe new --recipients FILE`"),
    (12, probed(exist=2300), PASS, "2,300 recipients exist at new, probed 1 h ago (list)"),
    (12, probed(exist=2300, age=8 * DAY), UNKNOWN, "probed 8 d ago, 7 d is the limit"),
    (12, probed(exist=2286, missing=14, examples=("ann@a.example", "bob@a.example")), FAIL,
     "14 of 2,300 do not exist at new, probed 1 h ago (list): ann@a.example, bob@a.example"),
    (12, probed(exist=1, missing=1, refused=1, reply="550 5.7.1 no", left=5, why="it closes"), FAIL,
     "1 of 8 does not exist at new; 1 of 8 is refused for another reason (550 5.7.1 no)"),
    (12, probed(exist=1, left=5, why="new broke off: 421 4.3.2 closing"), UNKNOWN,
     "5 of 6 were not asked about: new broke off: 421"),
    (12, probed(exist=9, put_off=1), UNKNOWN, "1 of 10 was put off"),
    (12, probed(exist=9, untold=1, open_domains=1), UNKNOWN,
     "whether 1 of 10 recipients exist cannot be told: new accepts anybody in 1 of 2 domains; compare"),
    (12, probed(exist=9, untold=1), UNKNOWN, "new does not offer SMTPUTF8"),
    (12, probed(), UNKNOWN, "nobody was asked about"),
    (12, both(probed(exist=8, missing=2), probed(exist=90)), FAIL, "2 of 10 do not exist"),
    (12, both(probed(exist=8, put_off=2), probed(exist=90)), UNKNOWN, "2 of 10 were put off"),
    (12, both(probed(exist=8), probed(exist=90)), PASS, "90 recipients exist"),
    (12, both(probed(exist=8, missing=2, age=8 * DAY), probed(exist=90)), PASS, "90 recipients exist"),
    (13, with_rules(probe_age=7 * DAY), UNKNOWN, "not known whether new takes whom old refuses"),
    (13, probed(exist=9), WARN, "whom old refuses was not asked about"),
    (13, probed(exist=8, untold=1, open_domains=1), WARN, "new accepts anybody in 1 of 2 domains (catch-all?)"),
    (13, probed(exist=9, age=8 * DAY), UNKNOWN, "not known"),
    (13, refusals(accepted=31, exist=31, missing=9, examples=("x@a.example",)), WARN,
     "new accepts 31 of 40 recipients that old refuses (catch-all?), probed 1 h ago: x@a.example"),
    (13, refusals(missing=30, put_off=8, left=2, why="421"), WARN,
     "of 40 recipients that old refuses 10 could not be told, probed 1 h ago: 421"),
    (13, refusals(missing=40), PASS, "new refuses what old refuses, 40 recipients probed 1 h ago"),
    (13, refusals(), PASS, "old has refused no recipient"),
    (13, refusals(missing=40, age=8 * DAY), UNKNOWN, "not known"),
    (14, with_rules(arrived_age=7 * DAY), WARN, "ready.arrived_age = 0"),
    (14, with_rules(arrived_age=7 * DAY, require_arrived=True), UNKNOWN, ""),
    (15, READY, PASS, "2 relay processes"),
    (15, but(relays=[]), FAIL, "no relay process"),
    (15, but(relays=[*READY.relays, relay("b/2", age=40.0, is_alive=False)]), FAIL, "b/2 last heard 40 s ago"),
    (15, but(relays=[relay("a/1", 2, 1), relay("a/2", 1, 1)]), FAIL, "a/2 has older settings"),
    (15, but(relays=[relay("a/1", 2, 1), relay("b/1", 1, 1)]), PASS, ""),
    (15, but(relays=[relay("a/1", 1, 2), relay("a/2", 1, 1)]), FAIL, "does not follow"),
    (15, but(relays=[Relay("a/1", 0.1, True, 1, 1, "knows no new")]), FAIL, "knows no new"),
    (15, but(reaches=[reach("a", ok=False, text="cannot connect to new:25: timed out")]), FAIL,
     "a cannot connect to new:25: timed out"),
    (15, but(reaches=[]), UNKNOWN, "a has not connected to new yet"),
    (15, but(reaches=[reach("a", age=3 * HOUR)]), UNKNOWN, "has not connected"),
    (15, but(hosts=[host(), host("w", "workers")]), PASS, ""),
    (15, replace(with_rules(check_every=0.0), reaches=[]), PASS, ""),
    (15, but(hours=[*hours(8)[:-1], replace(hours(8)[-1], failovers={"new": 2, "old": 9})]), WARN,
     "in its place 2 times in 7 d"),
    (15, but(hours=[replace(hours(8)[0], failovers={"new": 2}), *hours(8)[1:]]), PASS, ""),
    (15, but(hours=[*hours(8)[:-1], replace(hours(8)[-1], failovers={"old": 9})]), PASS, ""),
    (16, READY, PASS, ""),
    (16, but(hours=[*hours(8)[:-1], replace(hours(8)[-1], lost=2)]), FAIL, "2 messages were accepted without"),
    (16, but(uncertain_late_s=900.0), FAIL, "uncertain for 15 m longer"),
    (16, but(hosts=[host(spool_messages=4, spool_oldest_s=90.0)]), FAIL, "holds 4 messages, the oldest 1 m old"),
    (16, but(hosts=[host(spool_messages=4, spool_oldest_s=9.0)]), PASS, ""),
    (16, but(hosts=[host(), host("relay-b", age=180.0)]), FAIL, "relay-b last heard 3 m ago"),
    (16, but(hosts=[]), UNKNOWN, ""),
    (17, READY, PASS, ""),
    (17, but(old_reaches=[reach("a", "old", ok=False, text="MAIL is refused: 550 no")]), FAIL,
     "old from a: MAIL is refused: 550 no"),
    (17, but(hosts=[host(), host("worker-1", "workers")]), UNKNOWN, "worker-1 has not said MAIL to old yet"),
    (17, but(hosts=[host("a", "relay")]), UNKNOWN, "no host with workers"),
]  # fmt: skip


@pytest.mark.parametrize(("number", "evidence", "result", "text"), CASES)
def test_a_criterion_by_its_rule(number: int, evidence: Evidence, result: Result, text: str) -> None:
    """What it comes to, and the numbers that it says."""
    finding = found(number, evidence)
    assert finding is not None
    assert (finding.result, text in finding.text) == (result, True), finding


@pytest.mark.parametrize(
    ("number", "rules"),
    [(1, {"days": 0}), (2, {"min_messages": 0}), (3, {"busiest_hour": False}), (9, {"max_slower": 0}),
     (12, {"probe_age": 0.0}), (13, {"probe_age": 0.0}), (14, {"arrived_age": 0.0}), (17, {"check_every": 0.0})],
)  # fmt: skip
def test_what_is_not_asked_for_is_not_judged(number: int, rules: dict[str, Any]) -> None:
    """A criterion whose setting takes it out says nothing, and blocks nothing."""
    assert found(number, with_rules(**rules)) is None


def test_all_criteria_are_there_and_a_good_backup_is_ready() -> None:
    """17, in order, each with a case that it fails or does not know; probe and arrival are not asked for here."""
    assert [c.number for c in CRITERIA] == list(range(1, 18))
    verdict = judge(READY)
    assert verdict.is_ready, verdict.summary
    assert verdict.summary == "READY: 14 criteria"
    doubted = {number for number, _, result, _ in CASES if result is not PASS}
    assert doubted == set(range(1, 18))


def test_unknown_is_not_ready_and_a_warning_is() -> None:
    """Nobody has looked is no reason to switch; what is worth a look does not keep from it."""
    unprobed, uncompared = with_rules(probe_age=DAY), with_rules(arrived_age=DAY)
    assert not judge(unprobed).is_ready
    assert judge(uncompared).is_ready
    assert judge(uncompared).summary == "READY: 15 criteria, 1 warning"
    refused = replace(unprobed, refusals=Refusals([OpenGroup("550", 1)]))
    assert judge(refused).summary == "NOT READY: 1 fails, 2 unknown"


@given(st.integers(0, 10**9), st.integers(0, 10**9), st.integers(0, 100))
def test_more_put_off_is_never_better(seen: int, open_: int, allowed: int) -> None:
    """Whatever the shares are, one more that is put off turns no failure into a pass."""
    order = [PASS, WARN, FAIL]

    def result(count: int) -> Result:
        finding = found(5, replace(with_rules(max_deferred=allowed), deferrals=Deferrals(open=count, seen=seen)))
        assert finding is not None
        return finding.result

    assert order.index(result(open_ + 1)) >= order.index(result(open_))


EVERY: Sequence[Callable[[Evidence], Finding | None]] = [c.judge for c in CRITERIA]


@pytest.mark.parametrize("judge_one", EVERY)
def test_nothing_known_is_never_a_pass_of_what_was_asked(judge_one: Callable[[Evidence], Finding | None]) -> None:
    """An empty ledger makes nobody ready, and breaks nothing."""
    nothing = Evidence(
        "new", "old", NOW, refusals=NOT_RECORDED, deferrals=NOT_RECORDED, outages=NOT_RECORDED, domains=NOT_RECORDED
    )
    finding = judge_one(nothing)
    assert finding is not None
    assert finding.result is not PASS
