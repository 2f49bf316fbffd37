"""The class of a refusal: what it is about, and what to do about it at the new server.

The enhanced status code decides if the reply has one (RFC 3463, the IANA registry), else the basic code and the text.
A reply that fits no class is "other". Nothing here raises.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class RefusalClass(NamedTuple):
    """A class of refusals: its name, and one line on what to do at the new server."""

    name: str
    advice: str


NO_MAILBOX = RefusalClass(
    "no such mailbox", "Create the mailbox, alias or group there, or import the old server's list of recipients again."
)
DISABLED = RefusalClass(
    "mailbox disabled", "Enable the mailbox there: it exists, but does not take mail (suspended, or not yet licensed)."
)
FULL = RefusalClass("mailbox full", "Raise the mailbox's quota there, at least to what it uses on the old server.")
TOO_LARGE = RefusalClass(
    "too large", "Raise the message size limit there to the old server's; for Postfix message_size_limit."
)
RELAYING = RefusalClass(
    "relaying denied", "Make the domain one of the new server's own there, or allow this relay's address to send to it."
)
POLICY = RefusalClass(
    "policy", "Exempt this relay's address there from spam, SPF and reputation checks: it passes on others' mail."
)
AUTHENTICATION = RefusalClass(
    "authentication", "Give this relay a user and password in the backup's URL, or trust its address there."
)
SENDER = RefusalClass(
    "sender refused", "Turn off checks of the sender's domain there for this relay, or set sender = null for it here."
)
PROTOCOL = RefusalClass(
    "protocol", "Enable the SMTP extension that the message needs there: 8BITMIME, SMTPUTF8, longer lines."
)
GREYLISTING = RefusalClass(
    "greylisting", "Exempt this relay's address from greylisting there: who sends through it is known already."
)
RATE = RefusalClass("rate limit", "Raise the limits on connections, messages and recipients of this relay's address.")
ROUTING = RefusalClass(
    "routing", "Check the new server's DNS and its route for this domain: it does not know where the mail belongs."
)
SYSTEM = RefusalClass("server trouble", "Look at the new server's own log and disks: it says that it is the trouble.")
OTHER = RefusalClass("other", "Search the new server's log for this reply; it is the server's own.")

CLASSES = (
    NO_MAILBOX, DISABLED, FULL, TOO_LARGE, RELAYING, POLICY, AUTHENTICATION, SENDER, PROTOCOL, GREYLISTING, RATE,
    ROUTING, SYSTEM, OTHER,
)  # fmt: skip
_BY_NAME = {found.name: found for found in CLASSES}

_BY_DETAIL = {
    "1.1": NO_MAILBOX, "1.2": ROUTING, "1.3": NO_MAILBOX, "1.6": NO_MAILBOX, "1.10": NO_MAILBOX,
    "1.7": SENDER, "1.8": SENDER, "1.9": SENDER,
    "2.1": DISABLED, "2.2": FULL, "2.3": TOO_LARGE,
    "3.1": SYSTEM, "3.2": SYSTEM, "3.4": TOO_LARGE, "3.5": SYSTEM,
    "4.5": SYSTEM, "4.7": RATE,
    "5.3": RATE,
    "7.0": POLICY, "7.8": AUTHENTICATION, "7.9": AUTHENTICATION, "7.11": AUTHENTICATION, "7.28": RATE,
}  # fmt: skip
_BY_SUBJECT = {"3": SYSTEM, "4": ROUTING, "5": PROTOCOL, "6": PROTOCOL, "7": POLICY}
_BY_CODE = {
    530: AUTHENTICATION, 534: AUTHENTICATION, 535: AUTHENTICATION, 538: AUTHENTICATION, 551: RELAYING, 552: TOO_LARGE,
    421: SYSTEM, 451: SYSTEM, 452: SYSTEM, 500: PROTOCOL, 501: PROTOCOL, 502: PROTOCOL, 503: PROTOCOL, 504: PROTOCOL,
    555: PROTOCOL, 553: SENDER,
}  # fmt: skip
# Texts of servers that give no enhanced code or a general one (x.0.0, x.1.0, x.2.0, x.7.1); the first match counts.
_WORDS = (
    (re.compile(r"gr[ea]y[ -]?list|postgrey"), GREYLISTING),
    (re.compile(r"relay(?:ing)? (?:access |is |was )?(?:denied|not|prohibited)|not (?:permitted|allowed) to relay"
                r"|(?:unable|refus\w+|cannot) (?:to )?relay|rcpthosts|not local(?:$|[;,.:])|local domain"),
     RELAYING),
    (re.compile(r"over ?quota|quota (?:is )?exceeded|exceed\w* (?:\w+ )?quota|mailbox (?:is )?full|full mailbox"
                r"|insufficient disk (?:space )?quota"), FULL),
    (re.compile(r"too (?:large|big)|size (?:limit )?exceed|exceed\w* (?:\w+ ){0,3}size|larger than"), TOO_LARGE),
    (re.compile(r"sender (?:e?mail )?address"
                r"|sender(?:\W+<\w+>)? (?:is |was )?(?:rejected|refused|denied|blocked|not allowed)"
                r"|(?:rejected|refused|denied|blocked|bad|invalid|unknown) (?:sender|mail from)"), SENDER),
    (re.compile(r"(?:user|mailbox|recipient|account|address|alias|inbox)(?:\W+<\w+>)? (?:is )?"
                r"(?:unknown|not found|does ?n[o']t exist|unavailable|invalid|not known|does not exist|rejected)"
                r"|(?:unknown|no such|invalid|unrouteable|unrecogni[sz]ed|nonexistent|bad)"
                r" (?:virtual |local )?(?:user|mailbox|recipient|account|address|alias|person|destination mailbox)"
                r"|no mailbox|unknown in|not listed in"),
     NO_MAILBOX),
    (re.compile(r"disabled|inactive|suspended|deactivated"), DISABLED),
    (re.compile(r"rate ?limit|too (?:many|much|fast|frequent)|throttl|limit exceeded|slow down"), RATE),
    (re.compile(r"authenticat|log ?in|credentials"), AUTHENTICATION),
    (re.compile(r"sender|mail from|envelope from|return path|spoof"), SENDER),
    (re.compile(r"blocked|black ?list|block ?list|spam|reputation|policy|spf|dkim|dmarc|denied|not allowed|prohibited"
                r"|virus|malware|banned"), POLICY),
)  # fmt: skip
_GENERAL = frozenset({"", "0.0", "1.0", "2.0", "5.0", "6.0", "7.0", "7.1", "4.1", "3.0"})


def classify(code: int, status: str, text: str) -> RefusalClass:
    """Return the class of a reply, given its basic code, its enhanced code ("" for none) and its normalised text."""
    detail = status[2:]
    if detail not in _GENERAL and (found := _BY_DETAIL.get(detail)):
        if found is RATE or code >= 500 or not _WORDS[0][0].search(text):
            return found
        return GREYLISTING
    if (status and detail not in _GENERAL and (found := _BY_SUBJECT.get(detail.partition(".")[0]))) and not (
        code < 500 and _WORDS[0][0].search(text)
    ):
        return found
    for words, found in _WORDS:
        if words.search(text) and not (found is GREYLISTING and code >= 500):
            return found
    return _BY_DETAIL.get(detail) or _BY_SUBJECT.get(detail.partition(".")[0]) or _BY_CODE.get(code) or OTHER


def named(name: str) -> RefusalClass:
    """Return the class of this name, "other" if there is none."""
    return _BY_NAME.get(name, OTHER)
