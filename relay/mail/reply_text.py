"""The text of a refusal without what differs from message to message, so that equal reasons have equal texts.

What the envelope itself names goes first: this recipient, the sender, their domains, our own names. What only has the
shape of an address, a host, an IP address, a date, an id or a number goes next. Linear in what is read and bounded:
whatever a server says costs less than a millisecond and becomes at most 200 characters. Nothing here fails.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from relay.mail.envelope import Envelope
from relay.mail.reply import Reply
from relay.mail.text import printable

_READ = 400  # characters that are looked at for shapes
_NAMED = 1000  # and for the envelope's own words: longer ones leave more of the text within what is read
_KEPT = 200
_SHORTEST = 4  # letters of a local part that is found without quotes around it
# Placeholders while the text is worked on: letters that no printable text has.
_ADDRESS, _USER, _DOMAIN, _US, _IP, _NUMBER = map(chr, range(0xE000, 0xE006))
_MARKS = f"{_ADDRESS}-{_NUMBER}"
_SHOWN = str.maketrans({
    _ADDRESS: "<address>", _USER: "<user>", _DOMAIN: "<domain>", _US: "<us>", _IP: "<ip>", _NUMBER: "#",
})  # fmt: skip
_FOREIGN = str.maketrans(dict.fromkeys(range(0xE000, 0xE006), "?"))
# Local parts (and names without a dot) that replies are made of: found only where they stand in quotes or brackets.
_ORDINARY = frozenset({
    "abuse", "accept", "accepted", "access", "account", "address", "addresses", "admin", "administrator",
    "alias", "allowed", "authentication", "authorized", "bounce", "box", "blocked", "cannot", "client",
    "closed", "code", "command", "connection", "contact", "content", "data", "delivered", "delivery", "denied",
    "directory", "disabled", "does", "domain", "email", "error", "exceeded", "exist", "exists", "failed",
    "found", "from", "full", "greylisted", "have", "help", "here", "host", "http", "https", "inbox", "info",
    "invalid", "known", "later", "limit", "line", "list", "listed", "local", "lookup", "mail", "mailbox",
    "mailer-daemon", "mailhost", "message", "messages", "more", "name", "network", "null", "object", "only",
    "over", "permitted", "please", "policy", "postmaster", "protocol", "quota", "receive", "receiver",
    "recipient", "recipients", "refused", "reject", "rejected", "relay", "relaying", "reply", "return", "root",
    "route", "sales", "security", "send", "sender", "sending", "server", "service", "size", "smtp", "spam",
    "such", "support", "system", "table", "temporarily", "test", "that", "this", "through", "time",
    "transaction", "unavailable", "unknown", "user", "users", "using", "valid", "verify", "virtual", "virus",
    "webmaster", "with", "your",
})  # fmt: skip
_OPENING, _CLOSING = frozenset("<\"'`([{"), frozenset(">\"'`)]}")

_STATUS = r"[245]\.\d{1,3}\.\d{1,3}(?![\d.]*\d)"
_STATUS_AT_FRONT = re.compile(rf"[#(\[\s]*({_STATUS})[)\]:,;]*(?:\s|$)")
_STATUS_IN_BRACKETS = re.compile(rf"\(#({_STATUS})\)")  # as qmail writes it, at the end
_ASIDE = re.compile(r"\(in reply to [^()]{0,80}\)")
_DAY = r"(?:mon|tue|wed|thu|fri|sat|sun)[a-z]{0,6}"
_MONTH = r"(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]{0,6}"
_CLOCK = r"\d{1,2}:\d\d(?::\d\d(?:[.,]\d{1,9})?)?(?:[ ]?[ap]m\b)?"
_ZONE = r"(?:[ ]?(?:z|utc|gmt|[+-]\d\d:?\d\d)\b)?"
_START = r"(?<![\w.@+-])"
_SHAPES = re.compile(
    rf"""
    (?=[\w:"])(?:
    (?P<word>(?<![\w.@+=:/~-])(?!{_DAY}\b|{_MONTH}\b)[^\W\d_]{{1,60}}+(?=[ ,;)]|$))  # most of what is there
    |(?P<url>\b(?:(?:https?|ftp)://|www\.)(?:[^\s<>"'()\[\]{{}}]|[{_MARKS}])+)
    |(?P<date>{_START}(?:
        (?:{_DAY},?\ )?
        (?:\d{{1,2}}[ -]{_MONTH}[ -]\d{{2,4}}(?:,?[ t]{_CLOCK})?{_ZONE}
          |{_MONTH}\ {{1,2}}\d{{1,2}},?\ (?:\d{{4}},?\ )?{_CLOCK}{_ZONE}(?:\ \d{{4}}\b)?)
        |\d{{4}}[-/.]\d{{1,2}}[-/.]\d{{1,2}}(?:[t ]{_CLOCK}{_ZONE})?
        |\d{{1,2}}[/.]\d{{1,2}}[/.]\d{{4}}(?:,?\ {_CLOCK}{_ZONE})?
        |\d{{1,2}}:\d\d:\d\d(?:[.,]\d{{1,9}})?{_ZONE}
      )(?![\w:]))
    |(?P<id>\bid=[^\s<>()\[\]{{}},;]+)
    |(?P<address>{_START}(?:"[^"\s]{{1,64}}"|\w[^\s<>()\[\]{{}},;:"'@]{{0,128}}+)@
        (?:\[[^\]\s]{{1,60}}\]|[\w-]{{1,63}}+(?:\.[\w-]{{1,63}}+){{0,12}}|[{_MARKS}]))
    |(?P<host>{_START}(?:[\w-]{{1,63}}+\.){{1,12}}(?:xn--[\w-]{{1,59}}|[^\W\d_]{{2,24}})(?![\w@-]))
    |(?P<ip>(?<![\w.:])::(?!\w)
      |(?<![\w.:])(?:ipv6:)?(?=:{{0,2}}[0-9a-f])
        [0-9a-f]{{0,4}}(?::[0-9a-f]{{0,4}}){{2,8}}(?:(?:\.\d{{1,3}}){{3}}(?:(?=:\W):)?)?(?:%\w{{1,16}})?(?:/\d{{1,3}})?(?![\w:])
      |(?<![\w.])\d{{1,3}}(?:\.\d{{1,3}}){{3}}(?:[:/]\d{{1,5}})?(?![\w-]))
    |(?P<number>(?<!\w)\d++(?:[:.,/-]\d++)*+(?!\w))
    |(?P<token>\w[\w.+/~-]*+={{0,2}})
    )
    """,
    re.VERBOSE,
)
_CODE = re.compile(r"(?=.{1,9}$)[^\W\d]+[_-]?\d+")  # MXIN506, OFR_999: the provider's name for the reason
_KEPT_TOKENS = frozenset({"8bitmime", "8bit", "7bit"})
_HEX = re.compile(r"[0-9a-f]{8,}")
_DIGIT = re.compile(r"\d")
_TAIL = ".-/+~="
_URL_REASON = re.compile(r"[?&]p=([a-z_]{1,40})")  # Google's names for its reasons
_URL_VARIES = re.compile(rf"[\d:@{_MARKS}]")
_IN_ANGLES = re.compile(rf"<([{_MARKS}])>")
_RUN = re.compile(rf"([{_MARKS}])(?:[ ,;:/.-]{{0,3}}\1)+")


@dataclass(frozen=True, slots=True)
class Known:
    """What a transaction's own words are, whoever says them: addresses as in the envelope, the null sender ""."""

    recipient: str = ""
    sender: str = ""
    client: str = ""  # the client's IP address
    message_id: str = ""
    ours: tuple[str, ...] = ()  # the name that we say in EHLO, and our address where it is known
    server: str = ""  # the other side's host name or address

    def of(self, envelope: Envelope, recipient: int) -> Known:
        """Return it with the words of an envelope, for one of its recipients."""
        return replace(
            self,
            recipient=envelope.recipients[recipient].address,
            sender=envelope.sender,
            client=envelope.client_address,
            message_id=envelope.id,
        )


class Normalised(NamedTuple):
    """A reply's enhanced status code ("" where it has none) and what is left of its text."""

    status: str
    text: str


def normalise(reply: Reply, known: Known) -> Normalised:
    """Return a reply without what differs from message to message."""
    text = _one_line(" ".join(reply.lines)[: 2 * _NAMED].lower())[:_NAMED].translate(_FOREIGN)
    status, text = _without_status(text)
    for word, mark, bare in _words(known):
        text = _marked(text, word, mark, bare=bare)
    if len(text) > _READ:  # the word that is cut through goes: how much of it is left differs
        text = text[:_READ].rpartition(" ")[0] or text[:_READ]
    text = _SHAPES.sub(_shape, _ASIDE.sub("", text))
    text = _RUN.sub(r"\1", _IN_ANGLES.sub(r"\1", text))
    text = _one_line(text).rstrip(" .,;:!?-")[:_KEPT]
    return Normalised(status, printable(text.translate(_SHOWN)))


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _without_status(text: str) -> tuple[str, str]:
    found = _STATUS_AT_FRONT.match(text)
    if found is None:
        found = _STATUS_IN_BRACKETS.search(text)
        return (found[1], text[: found.start()] + text[found.end() :]) if found else ("", text)
    # Some say it in front of each line.
    status, text = found[1], text[found.end() :]
    return status, re.sub(rf"(?<![\d.])[#(\[]*{re.escape(status)}(?![\d.]*\d)[)\]]*[:;,]?\s?", "", text)


def _words(known: Known) -> Iterator[tuple[str, str, bool]]:
    """Yield the envelope's words, the longest first: the word, its placeholder, whether it is found without quotes."""
    words: dict[str, tuple[str, bool]] = {}

    def add(text: str, mark: str, *, bare: bool = True) -> None:
        word = text.lower()
        if word and word not in words:
            words[word] = (mark, bare)

    for name in known.ours:
        add(name, _IP if _is_ip(name) else _US)
    for address in (known.recipient, known.sender):
        local, at, domain = address.rpartition("@")
        add(address, _ADDRESS if at else _USER, bare=bool(at))
        if at:
            for form in _forms(domain):
                add(form, _DOMAIN, bare="." in form or (len(form) >= _SHORTEST and form.lower() not in _ORDINARY))
            if address is known.recipient:
                add(local, _USER, bare=len(local) >= _SHORTEST and local.lower() not in _ORDINARY)
    add(known.client, _IP)
    add(known.message_id, _NUMBER)
    add(known.server, _IP if _is_ip(known.server) else _DOMAIN)
    for word in sorted(words, key=len, reverse=True):
        yield word, *words[word]


def _is_ip(name: str) -> bool:
    return ":" in name or name.replace(".", "").isdigit()


def _forms(domain: str) -> Iterable[str]:
    """Return a domain as it is written, and as DNS has it."""
    if domain.isascii():
        return (domain,)
    try:
        return domain, domain.encode("idna").decode("ascii")
    except UnicodeError:
        return (domain,)


def _marked(text: str, word: str, mark: str, *, bare: bool) -> str:
    """Return text with a placeholder for each place where the word stands as a whole; unless ``bare``, in quotes."""
    at = text.find(word)
    if at < 0:
        return text
    parts, done = [], 0
    while at >= 0:
        end = at + len(word)
        before, after, beyond = text[at - 1 : at], text[end : end + 1], text[end + 1 : end + 2]
        if bare:
            is_whole = not (_is_inner(before) or (before in {"@", ".", "-", "+"} and before)) and not (
                _is_inner(after) or after == "@" or (after in {".", "-", "+"} and _is_inner(beyond))
            )
        else:
            is_whole = before in _OPENING and after in _CLOSING
        if is_whole:
            parts += [text[done:at], mark]
            done = end
        at = text.find(word, end if is_whole else at + 1)
    return "".join([*parts, text[done:]])


def _is_inner(character: str) -> bool:
    return character.isalnum() or character == "_"


def _shape(found: re.Match[str]) -> str:
    kind, text = found.lastgroup, found[0]
    if kind == "word":
        return _NUMBER if len(text) >= 8 and _HEX.fullmatch(text) else text
    if kind == "token":
        return _token(text)
    if kind == "url":
        return _url(text)
    if kind == "id":
        return "id=" + _NUMBER
    if kind == "ip":  # with a colon behind it that is none of its own
        return _IP + ":" * (text.endswith(":") and (text.endswith(":::") or not text.endswith("::")))
    return {"address": _ADDRESS, "host": _DOMAIN}.get(kind or "", _NUMBER)


def _token(text: str) -> str:
    """Return a word as it is, or a placeholder for an id or a number."""
    if not _DIGIT.search(text):
        return _NUMBER if _HEX.fullmatch(text) else text
    word = text.rstrip(_TAIL)
    if word in _KEPT_TOKENS or _CODE.fullmatch(word):
        return text
    return _NUMBER + text[len(word) :].replace("=", "")


def _url(text: str) -> str:
    """Return a URL without what is not the same in all: segments with digits, its query but for a reason's name."""
    word = text.rstrip(".,;:!?")
    place, mark, query = word.partition("?")
    scheme, slashes, path = place.partition("://")
    host, *segments = (path if slashes else place).split("/")
    path = "/".join([_NUMBER if _URL_VARIES.search(host) else host, *map(_segment, segments)])
    reason = _URL_REASON.search(mark + query)
    shown = f"{scheme}{slashes}{path}" if slashes else path
    return shown + (f"?p={reason[1]}" if reason else "") + text[len(word) :]


def _segment(text: str) -> str:
    """Return a part of a URL's path, or a placeholder: one like a.example.html is of a domain."""
    return _NUMBER if _URL_VARIES.search(text) or text.count(".") > 1 else text
