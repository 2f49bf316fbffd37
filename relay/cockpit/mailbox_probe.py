"""Asks a server whether mailboxes exist there: MAIL with the null sender, RCPT, RSET and QUIT, never DATA.

It is modest: one connection at a time, a few addresses in each, and no more than so many in all, within a deadline. In
each domain an address that nobody can have goes first: a server that takes it takes anything, so that its yes says
nothing. A 4xx, a 421, silence or a server that cannot be reached leaves a mailbox unknown; nothing here raises.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterator, Sequence
from enum import StrEnum
from typing import NamedTuple

from relay.client.connect import connect
from relay.client.connection import Connection
from relay.client.errors import ClientError
from relay.cockpit.finding import Finding, fails, passes, unknown
from relay.cockpit.formatting import some
from relay.cockpit.moves import Kept, MovePlan
from relay.config.model import Settings
from relay.mail.destination import Destination
from relay.mail.refusal_class import DISABLED, NO_MAILBOX, classify
from relay.mail.reply import Reply
from relay.mail.text import printable
from relay.mail.timeouts import Timeouts

MOST = 1000  # addresses in all
_PER_CONNECTION = 20
_SECONDS = 300.0  # for all together
_STEP_SECONDS = 10.0  # for the reply to one command
_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789!#$%&'*+-/=?^_`{|}~.")


class Exists(StrEnum):
    """What a server said of a mailbox."""

    YES = "exists"
    NO = "does not exist"
    REFUSED = "refused"
    UNKNOWN = "unknown"


class Probed(NamedTuple):
    """A mailbox and what was said of it."""

    address: str
    result: Exists
    text: str

    @property
    def keeps(self) -> bool:
        """Whether that speaks against moving it."""
        return self.result in {Exists.NO, Exists.REFUSED}


def probe(settings: Settings, server: Destination, addresses: Sequence[str]) -> list[Probed]:
    """Ask about these addresses, as they are compared (relay.mail.address_keys); a domain cannot be asked about."""
    asked = [one for one in addresses if not one.startswith("@")][:MOST]
    asking = _Asking(settings, server)
    asyncio.run(asking.all(asked))
    found = []
    for one in addresses:
        if one.startswith("@"):
            why = "a domain is no mailbox: nobody was asked"
        else:
            why = asking.trouble or f"not asked: more than {MOST} addresses"
        found.append(asking.found.get(one) or Probed(one, Exists.UNKNOWN, why))
    return found


class _Asking:
    """The connections to one server, and what it has said so far."""

    def __init__(self, settings: Settings, server: Destination) -> None:
        limits = settings.relay.timeouts
        self._timeouts = Timeouts(*(min(limit, _STEP_SECONDS) for limit in limits))
        self._hostname = settings.smtp.domain
        self._server = server
        self._domains: dict[str, str] = {}  # those asked for nobody's mailbox, and why their yes says nothing
        self.found: dict[str, Probed] = {}
        self.trouble = ""  # why it ended early

    async def all(self, addresses: Sequence[str]) -> None:
        try:
            async with asyncio.timeout(_SECONDS):
                for start in range(0, len(addresses), _PER_CONNECTION):
                    await self._some(addresses[start : start + _PER_CONNECTION])
                    if self.trouble:
                        return
        except TimeoutError:
            self.trouble = f"no time was left: {self._server.name} has not answered within {_SECONDS:.0f} s"

    async def _some(self, addresses: Sequence[str]) -> None:
        try:
            connection = await connect(self._server, local_hostname=self._hostname, timeouts=self._timeouts)
        except ClientError as error:
            self.trouble = printable(f"{self._server.name} cannot be used: {error}")
            return
        try:
            await self._ask(connection, addresses)
            await self._say(connection, b"RSET")
            await connection.quit(timeout=min(self._timeouts.connect, 2))
        except ClientError as error:
            self.trouble = printable(f"{self._server.name} broke off: {error}")
        finally:
            connection.close()

    async def _ask(self, connection: Connection, addresses: Sequence[str]) -> None:
        utf8 = "SMTPUTF8" in connection.extensions
        reply = await self._say(connection, b"MAIL FROM:<>" + (b" SMTPUTF8" if utf8 else b""))
        if not reply.is_positive:
            self.trouble = printable(f"{self._server.name} refuses MAIL FROM:<>: {reply.text}")
            return
        for address in addresses:
            local, _, domain = address.rpartition("@")
            if not address.isascii() and not utf8:
                self._note(address, Exists.UNKNOWN, f"{self._server.name} does not offer SMTPUTF8")
                continue
            if domain not in self._domains:
                nobody = f"no-such-mailbox-{secrets.token_hex(8)}"
                self._domains[domain] = _control(await self._rcpt(connection, nobody, domain))
            reply = await self._rcpt(connection, local, domain)
            if reply.is_positive and self._domains[domain]:
                self._note(address, Exists.UNKNOWN, f"{self._server.name} {self._domains[domain]}")
            else:
                self._note(address, *_judged(reply))

    async def _rcpt(self, connection: Connection, local: str, domain: str) -> Reply:
        reply = await self._say(connection, f"RCPT TO:<{_quoted(local)}@{domain}>".encode())
        if reply.code == 421:
            raise ClientError("it closes", stage="RCPT", reply=reply)
        return reply

    async def _say(self, connection: Connection, line: bytes) -> Reply:
        return await connection.command(line, timeout=self._timeouts.command)

    def _note(self, address: str, result: Exists, text: str) -> None:
        self.found[address] = Probed(address, result, printable(text))


def _control(reply: Reply) -> str:
    """Return why a yes says nothing in a domain, by what is said of a mailbox that nobody has; "" where it does."""
    if reply.is_positive:
        return "accepts anything in this domain, so this says nothing"
    if reply.is_temporary:
        return f"puts off whoever asks: {reply.text}"
    return ""


def _judged(reply: Reply) -> tuple[Exists, str]:
    if reply.is_positive:
        return Exists.YES, reply.text
    if reply.is_temporary:
        return Exists.UNKNOWN, f"put off: {reply.text}"
    is_about_mailbox = classify(reply.code, reply.status, reply.text.lower()) in {NO_MAILBOX, DISABLED}
    return (Exists.NO if is_about_mailbox else Exists.REFUSED), reply.text


def _quoted(local: str) -> str:
    """Return a local part as it stands on the wire (RFC 5321 4.1.2): quoted where it is no dot-string."""
    if all(local.split(".")) and all(c in _PLAIN or not c.isascii() for c in local):
        return local
    return '"' + local.replace("\\", "\\\\").replace('"', '\\"') + '"'


# What comes of it -----------------------------------------------------------------------------------------------------


def apply(made: MovePlan, found: Sequence[Probed], *, force: bool) -> None:
    """Keep whoever has no mailbox at the new server where it is; what nobody can tell is a remark."""
    untold: dict[str, list[str]] = {}
    for one in found:
        if one.keeps and not force:
            del made.wanted[one.address]
            made.kept.append(Kept(one.address, f"{made.to} says that it {_WORDS[one.result]}: {one.text}"))
        elif one.keeps:
            made.remarks.append(f"{one.address}: {made.to} says that it {_WORDS[one.result]}: {one.text}")
        elif one.result is Exists.UNKNOWN:
            untold.setdefault(one.text, []).append(one.address)
    made.remarks += [f"not known to exist at {made.to}: {some(names)}: {why}" for why, names in untold.items()]


_WORDS = {Exists.NO: "does not exist", Exists.REFUSED: "would be refused"}


def judged(one: Probed, name: str) -> Finding:
    """Return it as a criterion of one mailbox."""
    if one.result is Exists.YES:
        return passes(f"{name} takes RCPT for it, and refuses it for others: {one.text}")
    if one.keeps:
        return fails(f"{name} says that it {_WORDS[one.result]}: {one.text}")
    return unknown(one.text)


def counts(found: Sequence[Probed]) -> Iterator[tuple[str, int]]:
    """Yield each result that there is, and how often."""
    for result in Exists:
        if number := sum(one.result is result for one in found):
            yield result.value, number
