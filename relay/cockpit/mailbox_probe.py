"""Asks a server whether mailboxes exist there: MAIL, RCPT, RSET and QUIT, never DATA.

It is modest: one connection at a time, a few addresses in each, at a bounded pace, and it stops where the server wants
to be left alone. In each domain an address that nobody can have goes first: a server that takes it takes anything, or
refuses only after DATA, so that its yes says nothing. What is put off is asked again later. Nothing here raises;
``trouble`` says why it ended early, and what was answered until then has been told.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from collections.abc import Callable, Iterable
from enum import StrEnum
from typing import NamedTuple

from relay.client.connect import connect
from relay.client.connection import Connection
from relay.client.errors import ClientError
from relay.config.model import Settings
from relay.mail.destination import Destination
from relay.mail.esmtp import command_line
from relay.mail.refusal_class import DISABLED, NO_MAILBOX, RATE, classify
from relay.mail.reply import Reply
from relay.mail.reply_text import Known, normalise
from relay.mail.text import printable
from relay.mail.timeouts import Timeouts

PER_CONNECTION = 20
# Of one connection: Postfix delays its replies after 10 errors of a client and hangs up after 20
# (smtpd_soft_error_limit, smtpd_hard_error_limit). For the like reason there is one RSET a transaction, not one an
# address: Exim hangs up after 10 commands that are no mail (smtp_accept_max_nonmail).
_MOST_REFUSALS = 9
_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789!#$%&'*+-/=?^_`{|}~.")


class Exists(StrEnum):
    """What a server said of a mailbox."""

    YES = "exists"
    NO = "does not exist"
    REFUSED = "refused"  # for another reason
    PUT_OFF = "put off"
    UNTOLD = "cannot be told"


class Probed(NamedTuple):
    """A mailbox and what was said of it; ``is_accepted``: its RCPT was, whatever that says."""

    address: str
    result: Exists
    text: str
    is_accepted: bool = False


class Manner(NamedTuple):
    """How the server is asked: as whom ("" for the null sender), and how modestly."""

    sender: str = ""
    per_connection: int = PER_CONNECTION
    interval: float = 0.0  # seconds from one RCPT to the next
    step: float = 10.0  # seconds for the reply to one command, at most
    pauses: tuple[float, ...] = ()  # seconds, before those that were put off are asked again
    most_alike: int = 0  # refusals in a row with the same words, after which it stops; 0: it does not
    wants_refusals: bool = False  # that somebody does not exist is what it is to find


class MailboxProbe:
    """The connections to one server, and what it has said of each domain."""

    def __init__(
        self,
        settings: Settings,
        server: Destination,
        manner: Manner,
        note: Callable[[Probed], object],
        pausing: Callable[[int, float], object] = lambda _number, _seconds: None,
    ) -> None:
        """``note`` hears of each answer, the last one counts; ``pausing``: how many are put off, for how long."""
        self._timeouts = Timeouts(*(min(limit, manner.step) for limit in settings.relay.timeouts))
        self._hostname = settings.smtp.domain
        self._server = server
        self._manner = manner
        self._note = note
        self._pausing = pausing
        self._nobody: dict[str, str] = {}  # domain -> a local part that nobody has there; greylisting wants it again
        self._controls: dict[str, Reply] = {}  # domain -> what was said of that one, in this round
        self._put_off: list[str] = []
        self._alike = 0  # refusals in a row with the words ``_words``
        self._words: tuple[int, str] = (0, "")
        self._has_yes = False
        self._next = 0.0  # when the next RCPT may be sent, by the loop's clock
        self.trouble = ""

    async def ask(self, addresses: Iterable[str]) -> None:
        """Ask about addresses in the form in which they are compared (relay.mail.address_keys)."""
        waiting = list(addresses)
        for pause in (0.0, *self._manner.pauses):
            if pause:
                self._pausing(len(waiting), pause)
                await asyncio.sleep(pause)
            waiting = await self._round(waiting)
            if self.trouble or not waiting:
                return

    async def _round(self, addresses: Iterable[str]) -> list[str]:
        """Ask each once; returns who was put off."""
        queue, self._put_off = deque(addresses), []
        self._controls = {domain: said for domain, said in self._controls.items() if not said.is_temporary}
        while queue and not self.trouble:
            await self._session(queue)
        return self._put_off

    async def _session(self, queue: deque[str]) -> None:
        try:
            connection = await connect(self._server, local_hostname=self._hostname, timeouts=self._timeouts)
        except ClientError as error:
            self._stop(f"cannot be used: {error}")
            return
        left = self._manner.per_connection
        try:
            while queue and left > 0 and connection.refusals < _MOST_REFUSALS and not self.trouble:
                left -= await self._transaction(connection, queue, left)
                await self._say(connection, b"RSET")
            await connection.quit(timeout=min(self._timeouts.connect, 2))
        except ClientError as error:
            self._stop(f"broke off: {error}")
        finally:
            connection.close()

    async def _transaction(self, connection: Connection, queue: deque[str], most: int) -> int:
        """Take addresses from the queue and ask about them; returns how many, at most ``most``."""
        has_utf8 = "SMTPUTF8" in connection.extensions
        ahead = (self._manner.sender, *(queue[n] for n in range(min(most, len(queue)))))
        given = ("SMTPUTF8",) if has_utf8 and not all(map(str.isascii, ahead)) else ()
        reply = await self._say(connection, command_line("MAIL FROM", self._manner.sender, given))
        if not reply.is_positive:
            self._stop(f"refuses MAIL FROM:<{self._manner.sender}>: {reply.text}")
            return 0
        asked = used = 0
        while queue and asked < most and used < connection.limits.recipients and connection.refusals < _MOST_REFUSALS:
            address = queue[0]
            local, _, domain = address.rpartition("@")
            if not address.isascii() and not has_utf8:
                queue.popleft()
                self._note(Probed(address, Exists.UNTOLD, f"{self._server.name} does not offer SMTPUTF8"))
                continue
            is_control = domain not in self._controls
            reply = await self._rcpt(connection, self._nobody_of(domain) if is_control else local, domain)
            used += 1
            if used > 1 and reply.is_too_many_recipients:
                break  # of one transaction: the next one has room
            if reply.is_temporary and classify(reply.code, reply.status, reply.text.lower()) is RATE:
                self._stop(f"asks us to slow down: {reply.text}")
                break
            if is_control:
                self._controls[domain] = reply
                continue
            queue.popleft()
            asked += 1
            self._judge(address, reply)
            if self.trouble:
                break
        return asked

    async def _rcpt(self, connection: Connection, local: str, domain: str) -> Reply:
        loop = asyncio.get_running_loop()
        if (wait := self._next - loop.time()) > 0:
            await asyncio.sleep(wait)
        self._next = loop.time() + self._manner.interval
        reply = await self._say(connection, f"RCPT TO:<{_quoted(local)}@{domain}>".encode())
        if reply.code == 421:
            raise ClientError("it closes", stage="RCPT", reply=reply)
        return reply

    async def _say(self, connection: Connection, line: bytes) -> Reply:
        return await connection.command(line, timeout=self._timeouts.command)

    def _nobody_of(self, domain: str) -> str:
        return self._nobody.setdefault(domain, f"no-such-mailbox-{secrets.token_hex(8)}")

    def _stop(self, why: str) -> None:
        self.trouble = self.trouble or printable(f"{self._server.name} {why}")

    def _judge(self, address: str, reply: Reply) -> None:
        found = _judged(address, reply, self._controls[address.rpartition("@")[2]], self._server.name)
        self._note(found)
        if found.result is Exists.PUT_OFF:
            self._put_off.append(address)
        if reply.is_positive:
            self._has_yes, self._alike = True, 0
        elif reply.is_permanent:
            # That nobody of a long list exists may be true; that nobody does from the start on, is another server.
            is_expected = found.result is Exists.NO and (self._has_yes or self._manner.wants_refusals)
            known = Known(address, self._manner.sender, ours=(self._hostname,))
            words = (reply.code, normalise(reply, known).text)
            self._alike = 0 if is_expected else self._alike + 1 if words == self._words else 1
            self._words = words
            if self._alike >= self._manner.most_alike > 0:
                self._stop(f"has refused {self._alike} in a row, all in the same words: {reply.text}")


def _judged(address: str, reply: Reply, control: Reply, name: str) -> Probed:
    """Return what a reply says, given what was said of somebody whom nobody can be."""
    if reply.is_positive:
        if control.is_positive:
            text = f"{name} accepts anything in this domain, so this says nothing"
            return Probed(address, Exists.UNTOLD, text, is_accepted=True)
        if control.is_temporary:
            text = printable(f"{name} puts off whoever asks: {control.text}")
            return Probed(address, Exists.PUT_OFF, text, is_accepted=True)
        return Probed(address, Exists.YES, reply.text, is_accepted=True)
    if not reply.is_permanent:
        return Probed(address, Exists.PUT_OFF, f"put off: {reply.text}")
    is_about_mailbox = classify(reply.code, reply.status, reply.text.lower()) in {NO_MAILBOX, DISABLED}
    return Probed(address, Exists.NO if is_about_mailbox else Exists.REFUSED, reply.text)


def _quoted(local: str) -> str:
    """Return a local part as it stands on the wire (RFC 5321 4.1.2): quoted where it is no dot-string."""
    if all(local.split(".")) and all(c in _PLAIN or not c.isascii() for c in local):
        return local
    return '"' + local.replace("\\", "\\\\").replace('"', '\\"') + '"'
