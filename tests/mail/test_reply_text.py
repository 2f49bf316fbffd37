"""Equal reasons have equal texts: what differs from message to message leaves no trace, and the server's words stay."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relay.mail.reply import Reply
from relay.mail.reply_text import Known, normalise

HELO = "relay.ours.example"
# Replies as servers say them; {a} this recipient, {l} its local part, {d} its domain, {s} the sender, {sd} its domain,
# {c} the client's address, {ip} some other one, {x} some address, {h} some host, {id} some id, {n} some number.
REPLIES = [
    "550 5.1.1 <{a}>: Recipient address rejected: User unknown in virtual mailbox table",
    "550 5.1.1 <{a}>... User unknown",
    "550 5.1.1 That account does not exist. https://support.google.com/mail/?p=NoSuchUser {id} - gsmtp",
    "550 5.4.1 Recipient address rejected: Access denied. AS(201806281) [{h} 2026-01-0{d1}T12:00:0{d1}.123Z {id}]",
    "554 5.7.1 Service unavailable; Client host [{c}] is on a list; https://www.spamhaus.org/query/ip/{c}",
    "550 5.7.1 [{ip}] Our system has detected an unusual rate of mail from your IP address {c}; see id={id}",
    "450 4.2.0 <{a}>: Recipient address rejected: Greylisted, see http://postgrey.schweikert.ch/help/{d}.html",
    "451 4.7.1 Greylisting in action, please come back in 00:0{d1}:{d1}7",
    "550 Mailbox {l} at {d} is not here",
    "550 No such user ({l})",
    "550 5.7.1 <{s}>: Sender address rejected: Domain {sd} not found",
    "550 5.7.26 Unauthenticated email from {sd} is not accepted due to domain's DMARC policy.",
    "554 5.7.1 <{h}[{ip}]>: Client host rejected: Access denied",
    "550 5.7.1 Relaying to <{a}> denied (from {h} [{ip}])",
    "552 5.3.4 Message size {n} exceeds fixed limit of {n} octets",
    "452 4.2.2 Mailbox of {a} is full: {n} of {n} kB",
    "550 5.1.1 <{a}> is not a valid mailbox, forwarded to <{x}>",
    "554 5.6.0 Message {id} rejected as spam on Fri, 1{d1} Nov 2026 16:12:3{d1} +0000",
    "421 4.7.0 {h} Error: too many connections from {ip}",
    "550 5.1.0 {ip}: {x} helo=<relay.ours.example> from=<{s}> to=<{a}>",
]
_letters = st.text("abcdefghijklmnopqrstuvwxyz", min_size=1, max_size=8)
_local = st.from_regex(r"[a-z]{2}[a-z0-9]{2,10}(\.[a-z0-9]{1,8})?", fullmatch=True)
_domain = st.builds(lambda a, b, tld: f"{a}{b}.{tld}", _letters, st.integers(0, 99) | st.just(""),
                    st.sampled_from(["example", "test", "co.example", "xn--p1ai", "museum"]))  # fmt: skip
# As Python 3.13 writes it, too: with the IPv4 address in it.
_ip = st.ip_addresses().map(str) | st.ip_addresses(v=4).map("::ffff:{}".format)


@st.composite
def transactions(draw: st.DrawFn) -> tuple[dict[str, str], Known]:
    local, domain, sender_domain = draw(_local), draw(_domain), draw(_domain)
    sender = f"{draw(_local)}@{sender_domain}"
    words = {
        "a": f"{local}@{domain}",
        "l": local,
        "d": domain,
        "s": sender,
        "sd": sender_domain,
        "c": draw(_ip),
        "ip": draw(_ip),
        "x": f"{draw(_local)}+tag@{draw(_domain)}",
        "h": f"mx{draw(st.integers(1, 99))}.{draw(_domain)}",
        "id": draw(st.uuids().map(str) | st.from_regex(r"[0-9][0-9A-F]{11}", fullmatch=True)),
        "n": str(draw(st.integers(0, 10**9))),
        "d1": str(draw(st.integers(0, 9))),
    }
    known = Known(words["a"], sender, words["c"], "0123456789abcdef", (HELO,), "new.example.net")
    return words, known


def _said(template: str, words: dict[str, str]) -> Reply:
    return Reply(int(template[:3]), (template[4:].format(**words),))


@given(one=transactions(), other=transactions())
def test_what_differs_leaves_no_trace(one: tuple[dict[str, str], Known], other: tuple[dict[str, str], Known]) -> None:
    """Another recipient, sender, client, host, date, id or number is the same reason."""
    for template in REPLIES:
        first = normalise(_said(template, one[0]), one[1])
        assert first == normalise(_said(template, other[0]), other[1])
        assert not re.search(r"\d", re.sub(r"https?://\S+", "", first.text))


def _of(*lines: str, known: Known | None = None, code: int = 550) -> tuple[str, str]:
    return tuple(normalise(Reply(code, lines), known or Known("ann@a.example", "bob@b.example", ours=(HELO,))))


def test_different_reasons_stay_different() -> None:
    """Nearly all of these are groups of their own."""
    words = dict(zip(
        ("a", "l", "d", "s", "sd", "c", "ip", "x", "h", "id", "n", "d1"),
        ("ann@a.example", "annlee", "a.example", "b@b.example", "b.example", "192.0.2.1", "192.0.2.2", "x@c.example",
         "mx.d.example", "0A1B2C3D4E5F", "17", "3"), strict=True))  # fmt: skip
    assert len({normalise(_said(template, words), Known(words["a"])) for template in REPLIES}) == len(REPLIES)


@pytest.mark.parametrize(
    ("lines", "status", "text"),
    [
        (["5.1.1 No mailbox", "5.1.1 at   all.", "5.1.1 Look it up"], "5.1.1", "no mailbox at all. look it up"),
        (["#5.1.0 Address rejected."], "5.1.0", "address rejected"),
        (["Sorry, no mailbox here by that name. (#5.1.1)"], "5.1.1", "sorry, no mailbox here by that name"),
        (["Requested mail action aborted (OFR_999), MXIN506"], "", "requested mail action aborted (ofr_999), mxin506"),
        (["User unknown: info, abuse"], "", "user unknown: info, abuse"),
        (["Host or domain name not found (in reply to RCPT TO command)"], "", "host or domain name not found"),
        (["12", "345 678,90 1:2"], "", "#"),
        ([""], "", ""),
        (["5.7.1"], "5.7.1", ""),
        (["relay.ours.example is not welcome here"], "", "<us> is not welcome here"),
        (["see https://example.org/help/codes?x=1&p=NoSuchUser&y=2."], "", "see https://example.org/help/codes?p=nosuchuser"),
        (["see https://example.org/help?r=ann@a.example"], "", "see https://example.org/help"),
        (["\ue000 \ue003 as they come"], "", "? ? as they come"),
        (["Почтовый ящик <ann@a.example> не найден"], "", "почтовый ящик <address> не найден"),
        (["Benutzer \\xfcnbekannt"], "", "benutzer \\xfcnbekannt"),
        (["half \udc80 a letter"], "", "half \\udc80 a letter"),
    ],
)  # fmt: skip
def test_the_reason_stays(lines: list[str], status: str, text: str) -> None:
    """The server's own words are kept, in whatever language, and its names for the reason."""
    assert _of(*lines) == (status, text)


@pytest.mark.parametrize("local", ["user", "mailbox", "unknown", "info", "address"])
def test_a_recipient_named_like_a_word_changes_nothing(local: str) -> None:
    """A mailbox called "user" is in no group of its own: its name is only read where it stands in quotes."""
    known = Known(f"{local}@a.example")
    text = "Recipient address rejected: user unknown in local mailbox table, info at {l}"
    assert (
        _of(text.format(l="<ann>"), known=Known("ann@a.example"))[1] == _of(text.format(l=f"<{local}>"), known=known)[1]
    )


def test_a_domain_is_no_part_of_another() -> None:
    """The recipient's domain is found as a whole, not within another address or host."""
    known = Known("ann@a.example")
    assert _of("a.example for bob@a.example at mx.a.example, not a.example.", known=known)[1] == (
        "<domain> for <address> at <domain>, not <domain>"
    )


def test_an_internationalised_domain_is_the_same_in_both_forms() -> None:
    """A server says it as DNS has it, or as it is written."""
    known = Known("ann@bücher.example")
    assert _of("no bücher.example here", known=known) == _of("no xn--bcher-kva.example here", known=known)


def test_how_far_it_is_read_does_not_depend_on_an_address() -> None:
    """A text that is cut has the same rest, however long the addresses in it are."""
    found = set()
    for local in ("ann1", "a-very-long-local-part-of-an-address-that-pushes-the-rest-away"):
        known = Known(f"{local}@a.example")
        found.add(_of(f"<{local}@a.example> " * 5 + "this is why it was refused " * 30, known=known))
    assert len(found) == 1


HOSTILE = [
    "a", "1", "a.a", "a@", "!", ":", "0:", "<", "a-", "1.2.3.", "http://", "http://a/1/", "jan 1 ", "é", "ab1 ", "# ",
    "\\xe9", "mon, 1 jan", "id=", "=@", "'\"@", "a.b@c.d", "1:1:", "ann@a.example ", "\ue000", '"', "(in reply to ",
    "5.1.1 ",
    "::ffff:", "www.", "a" * 64 + "@", "xn--", "٣", "%",
]  # fmt: skip


@pytest.mark.parametrize("piece", HOSTILE)
def test_a_hostile_reply_costs_little(piece: str) -> None:
    """Whatever is repeated to fill a reply, reading it takes under a millisecond and leaves at most 200 characters."""
    line = (piece * 512)[:506]
    known = Known("ann@a.example", "bob@b.example", "192.0.2.1", "0123456789abcdef", (HELO, "192.0.2.9"), "mx.example")
    reply = Reply(550, (line,) * 100)
    fastest = min(_seconds(reply, known) for _ in range(30))
    assert fastest < 0.001
    assert len(normalise(reply, known).text) <= 200 * len("<address>")


def _seconds(reply: Reply, known: Known) -> float:
    begun = time.process_time()
    normalise(reply, known)
    return time.process_time() - begun


@given(st.lists(st.text(max_size=200), min_size=1, max_size=5), st.text(max_size=30), st.text(max_size=30))
def test_nothing_that_a_server_says_is_too_much(lines: list[str], recipient: str, sender: str) -> None:
    """Any text becomes a printable one, and the same one again when it is read once more."""
    known = Known(recipient, sender, "192.0.2.1", "id", (HELO,), "mx")
    found = normalise(Reply(550, tuple(lines)), known)
    assert found.text.isprintable()
    assert found == normalise(Reply(550, tuple(lines)), known)
