"""One connection to a ScriptedServer: commands are read one after the other and answered as the script says."""

from __future__ import annotations

import asyncio
import base64
import re
import socket
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

from support.reactions import Close, Delay, Gate, HalfClose, Moment, Reaction, Reset, Silence, Trickle, wire
from support.recorded_sessions import Connection, Transaction

if TYPE_CHECKING:
    from support.scripted_server import ScriptedServer


class _Gone(Exception):
    """The connection has ended, by the client or by the script."""


class Conversation:
    """One connection, one command after the other."""

    def __init__(
        self, server: ScriptedServer, record: Connection, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.server = server
        self.record = record
        self.reader = reader
        self.writer = writer
        self.buffer = bytearray()
        self.transaction: Transaction | None = None
        self.xforward: dict[str, str] = {}

    async def run(self) -> str:
        try:
            await self._greet()
            while True:
                line = await self._line()
                with self.server.changed:
                    self.record.commands.append(line)
                    self.record.pipelined |= bool(self.buffer)
                    self.server.changed.notify_all()
                if await self._command(line):
                    return "quit"
        except _Gone as end:
            return str(end)

    async def _greet(self) -> None:
        limit = self.server.max_connections
        if limit is not None and self.server.open_connections > limit:
            await self._do("421 4.3.2 too many connections")
            raise _Gone("script")
        await self._do(self.server.reaction("CONNECT", "", self.record), self.server.greeting)

    async def _command(self, line: str) -> bool:
        verb = line.split(" ", maxsplit=1)[0].upper()
        scripted = self.server.reaction(self.server.key_for(line), line, self.record)
        handle = getattr(self, f"_on_{verb.lower()}", None)
        if handle is None:
            await self._do(scripted, "500 5.5.2 unknown command")
        else:
            await handle(line, scripted)
        return verb == "QUIT"

    async def _on_ehlo(self, line: str, scripted: Reaction) -> None:
        self.transaction = None
        self.record.helo = line.partition(" ")[2]
        extensions = [x for x in self.server.extensions if not (x == "STARTTLS" and self.record.tls)]
        await self._do(scripted, "\n".join(["250 scripted.example", *extensions]))

    _on_lhlo = _on_ehlo

    async def _on_helo(self, line: str, scripted: Reaction) -> None:
        self.transaction = None
        self.record.helo = line.partition(" ")[2]
        await self._do(scripted, "250 scripted.example")

    async def _on_starttls(self, _: str, scripted: Reaction) -> None:
        if self.server.tls is None or self.record.tls:
            await self._do(scripted, "502 5.5.1 not offered")
        elif (await self._do(scripted, "220 2.0.0 go ahead")).startswith("220"):
            await self._do(self.server.reaction("TLS", "", self.record))
            self.buffer.clear()  # what was injected before TLS must not count after it
            await self.writer.start_tls(self.server.tls)
            self.record.tls = True

    async def _on_auth(self, line: str, scripted: Reaction) -> None:
        words = line.split(" ")
        if words[1].upper() == "PLAIN":
            given = words[2] if len(words) > 2 else await self._ask("334 ")
            _, user, password = base64.b64decode(given).decode().split("\0")
            self.record.login = (user, password)
        elif words[1].upper() == "LOGIN":
            user = words[2] if len(words) > 2 else await self._ask("334 VXNlcm5hbWU6")
            password = await self._ask("334 UGFzc3dvcmQ6")
            self.record.login = (base64.b64decode(user).decode(), base64.b64decode(password).decode())
        elif words[1].upper() == "CRAM-MD5":
            challenge = b"<1896.697170952@postoffice.reston.mci.net>"  # the example of RFC 2195
            answer = await self._ask(f"334 {base64.b64encode(challenge).decode()}")
            user, digest = base64.b64decode(answer).decode().split(" ")
            self.record.login = (user, digest)
        else:
            scripted = scripted or "504 5.5.4 unknown mechanism"
        await self._do(scripted, "235 2.7.0 welcome")

    async def _on_xforward(self, line: str, scripted: Reaction) -> None:
        self.xforward |= {name.upper(): value for name, _, value in (w.partition("=") for w in line.split(" ")[1:])}
        await self._do(scripted, "250 2.0.0 ok")

    async def _on_xclient(self, line: str, scripted: Reaction) -> None:
        self.transaction = None
        await self._do(scripted, "220 scripted.example ESMTP again")

    async def _on_mail(self, line: str, scripted: Reaction) -> None:
        if self.transaction is not None:
            await self._do(scripted, "503 5.5.1 nested MAIL")
            return
        sender, parameters = _path(line)
        new = Transaction(sender, parameters, xforward=self.xforward, connection=self.record.index)
        if (await self._do(scripted, "250 2.1.0 ok")).startswith("2"):
            self.transaction, self.xforward = new, {}
            with self.server.changed:
                self.record.transactions.append(new)

    async def _on_rcpt(self, line: str, scripted: Reaction) -> None:
        if self.transaction is None:
            await self._do(scripted, "503 5.5.1 MAIL first")
            return
        address, parameters = _path(line)
        if (await self._do(scripted, "250 2.1.5 ok")).startswith("2"):
            self.transaction.recipients.append(address)
            self.transaction.recipient_parameters[address] = parameters
        else:
            self.transaction.refused.append(address)

    async def _on_data(self, _: str, scripted: Reaction) -> None:
        if self.transaction is None:
            await self._do(scripted, "503 5.5.1 MAIL first")
        elif not self.transaction.recipients:
            await self._do(scripted, "554 5.5.1 no valid recipients")
        elif (await self._do(scripted, "354 go ahead")).startswith("354"):
            answered = await self._body(self.transaction)
            await self._end_of_data(self.transaction, answered)

    async def _on_bdat(self, line: str, scripted: Reaction) -> None:
        words = line.split(" ")
        while len(self.buffer) < int(words[1]):
            await self._read()
        chunk = bytes(self.buffer[: int(words[1])])
        del self.buffer[: len(chunk)]
        if self.transaction is None or not self.transaction.recipients:
            await self._do(scripted, "503 5.5.1 RCPT first")
            return
        self.transaction.wire += chunk
        if words[-1].upper() == "LAST":
            stuffed = re.sub(rb"(\A|\r\n)\.", rb"\1..", self.transaction.wire)
            self.transaction.wire = stuffed
            await self._end_of_data(self.transaction, answered=False)
        else:
            await self._do(scripted, "250 2.0.0 chunk ok")

    async def _on_rset(self, _: str, scripted: Reaction) -> None:
        if (await self._do(scripted, "250 2.0.0 ok")).startswith("2"):
            self.transaction = None

    async def _on_noop(self, _: str, scripted: Reaction) -> None:
        await self._do(scripted, "250 2.0.0 ok")

    async def _on_vrfy(self, _: str, scripted: Reaction) -> None:
        await self._do(scripted, "252 2.0.0 maybe")

    async def _on_quit(self, _: str, scripted: Reaction) -> None:
        await self._do(scripted, "221 2.0.0 bye")

    async def _body(self, transaction: Transaction) -> bool:
        """Read up to CRLF.CRLF, strictly; say whether the script answered early."""
        answered = False
        interruption = self.server.in_data
        searched = 0
        while True:
            # The CRLF of the DATA line counts as the one before a lone dot that follows at once.
            if self.buffer.startswith(b".\r\n"):
                end, after = 0, 3
                break
            found = self.buffer.find(b"\r\n.\r\n", max(0, searched - 4))
            # Also where all of the message has come at once.
            if interruption is not None and (found if found >= 0 else len(self.buffer)) >= interruption[0]:
                transaction.wire = bytes(self.buffer)
                reaction, interruption = interruption[1], None
                answered = bool(await self._do(_called(reaction, Moment("", self.record))))
            if found >= 0:
                end, after = found + 2, found + 5
                break
            searched = len(self.buffer)
            try:
                await self._read()
            except _Gone:
                transaction.wire = bytes(self.buffer)
                raise
        transaction.wire = bytes(self.buffer[:end])
        del self.buffer[:after]
        return answered

    async def _end_of_data(self, transaction: Transaction, answered: bool) -> None:
        self.transaction = None
        self.record.behind_dots += bool(self.buffer)
        if answered:
            return
        for key in [f".<{address}>" for address in transaction.recipients] if self.server.lmtp else ["."]:
            found = self.server.reaction(key, key, self.record)
            if found is None and key != ".":
                found = self.server.reaction(".", key, self.record)
            # Recorded before the reply is sent: who has seen the reply finds the message here.
            reply = await self._do(found, "250 2.0.0 queued", lambda text: self._answered(transaction, text))
            if not reply:
                self._answered(transaction, "")

    def _answered(self, transaction: Transaction, text: str) -> None:
        with self.server.changed:
            transaction.replies.append(text)
            transaction.accepted |= text.startswith("2")
            self.server.changed.notify_all()

    async def _ask(self, challenge: str) -> str:
        await self._send(wire(challenge))
        return await self._line()

    async def _do(self, reaction: Reaction, normal: str = "", before_reply: Callable[[str], None] | None = None) -> str:
        """Do what the script says, or the normal thing; return the (first) reply that was sent, as text."""
        reply = ""
        for step in reaction if isinstance(reaction, tuple) else (reaction,):
            act = normal if step is None else step
            if not isinstance(act, str | bytes | Trickle):
                await self._act(act)
                continue
            text, pause = (act.text, act.seconds) if isinstance(act, Trickle) else (act, 0.0)
            if text and not reply:
                reply = wire(text).decode("utf-8", "surrogateescape").rstrip("\r\n")
                if before_reply is not None:
                    before_reply(reply)
            await self._send(wire(text) if text else b"", pause)
        return reply

    async def _act(self, act: object) -> None:
        match act:
            case Delay(seconds):
                await asyncio.sleep(seconds)
            case Gate():
                await act.pass_through()
            case Close():
                raise _Gone("script")
            case HalfClose():
                self.writer.write_eof()
                while await self.reader.read(65536):
                    pass
                raise _Gone("script")
            case Reset():
                self._reset()
                raise _Gone("script")
            case Silence():
                await asyncio.Event().wait()
            case _:
                raise TypeError(f"no reaction: {act!r}")

    def _reset(self) -> None:
        sock: socket.socket = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    async def _send(self, data: bytes, pause: float = 0) -> None:
        self.record.sent += data
        for piece in (data[i : i + 1] for i in range(len(data))) if pause else (data,):
            self.writer.write(piece)
            await self.writer.drain()
            if pause:
                await asyncio.sleep(pause)

    async def _read(self) -> None:
        data = await self.reader.read(65536)
        if not data:
            raise _Gone("eof")
        self.record.received += data
        self.buffer += data

    async def _line(self) -> str:
        while (end := self.buffer.find(b"\n")) < 0:
            await self._read()
        line = bytes(self.buffer[: end + 1])
        del self.buffer[: end + 1]
        self.record.bare_line_ends |= not line.endswith(b"\r\n")
        return line.rstrip(b"\r\n").decode("utf-8", "surrogateescape")


def _called(reaction: Reaction, moment: Moment) -> Reaction:
    return reaction(moment) if callable(reaction) else reaction


def _path(line: str) -> tuple[str, tuple[str, ...]]:
    """Take ``MAIL FROM:<a@b> SIZE=1`` apart: the address, and the parameters."""
    rest = line.partition(":")[2].lstrip()
    if not rest.startswith("<"):
        address, _, parameters = rest.partition(" ")
        return address, tuple(parameters.split())
    # A quoted local part may hold ">" and spaces.
    found = re.match(r'<((?:"(?:\\.|[^"\\])*"|[^">])*)>(.*)', rest, re.DOTALL)
    return (found[1], tuple(found[2].split())) if found else (rest, ())
