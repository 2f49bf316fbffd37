"""A client that speaks raw lines: a test says exactly what goes over the wire and which code must come back."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from typing import Self

from support.waiting import PATIENCE


class Unexpected(AssertionError):
    """The server said something else, or nothing in time."""


class Dialogue:
    """A blocking client, for tests whose server runs elsewhere; ``AsyncDialogue`` is its twin.

    ``with Dialogue(port) as client: client.hello(); client.say("MAIL FROM:<a@b>", 250)``
    """

    def __init__(
        self, port: int, host: str = "127.0.0.1", timeout: float = PATIENCE, greeting: int | None = 220
    ) -> None:
        self.timeout = timeout
        self.transcript: list[str] = []
        self._buffer = b""
        self.sock = socket.create_connection((host, port), timeout)
        self.greeting = ""
        if greeting is not None:
            try:
                self.greeting = self.expect(greeting)
            except BaseException:
                self.sock.close()
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send(self, *lines: str | bytes) -> None:
        """Send lines, each with CRLF, in one write."""
        self.raw(b"".join(_octets(line) + b"\r\n" for line in lines))

    def raw(self, data: bytes) -> None:
        """Send octets as they are."""
        self.transcript.append(f"> {data[:200]!r}")
        self.sock.sendall(data)

    def reply(self) -> str:
        """Read one reply, all its lines, and return it as sent (lines separated by newlines)."""
        lines: list[str] = []
        while not lines or lines[-1][3:4] == "-":
            lines.append(self.line())
        return "\n".join(lines)

    def line(self) -> str:
        """Read one line, without its CRLF."""
        while b"\n" not in self._buffer:
            try:
                data = self.sock.recv(65536)
            except TimeoutError:
                raise Unexpected(f"no reply within {self.timeout:g} s\n" + "\n".join(self.transcript)) from None
            if not data:
                raise Unexpected("the server closed\n" + "\n".join(self.transcript))
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        self.transcript.append(f"< {line!r}")
        return line.rstrip(b"\r").decode("utf-8", "surrogateescape")

    def expect(self, *codes: int | str) -> str:
        """Read one reply, which must begin with one of these (``250``, ``"4"``, ``"550 5.1.1"``)."""
        return _check(self.reply(), codes, self.transcript)

    def say(self, line: str | bytes, *codes: int | str) -> str:
        """Send a line and expect its reply; without codes any reply will do."""
        self.send(line)
        return self.expect(*codes) if codes else self.reply()

    def hello(self, name: str = "client.example") -> dict[str, str]:
        """Say EHLO and return the extensions with their parameters."""
        return _extensions(self.say(f"EHLO {name}", 250))

    def mail(self, sender: str, *recipients: str, data: bytes | None = None, end: int | str = 250) -> str:
        """Do a whole transaction in which everything is accepted; ``data`` is unstuffed. Return the last reply."""
        self.say(f"MAIL FROM:<{sender}>", 250)
        for recipient in recipients:
            self.say(f"RCPT TO:<{recipient}>", 250)
        return self.body(data if data is not None else b"Subject: test\r\n\r\ntext\r\n", end)

    def body(self, data: bytes, end: int | str = 250) -> str:
        """Say DATA, send a message (unstuffed; CRLF line ends) with its dot, expect the reply."""
        self.say("DATA", 354)
        self.raw(stuffed(data))
        return self.expect(end)

    def is_closed(self) -> bool:
        """Wait for the server's end of the connection; False when it stays open or says something."""
        if self._buffer:
            return False
        try:
            return not self.sock.recv(1)
        except ConnectionError:
            return True
        except TimeoutError:
            return False

    def starttls(self, context: ssl.SSLContext, name: str = "localhost") -> None:
        self.say("STARTTLS", 220)
        self.sock = context.wrap_socket(self.sock, server_hostname=name)

    def reset(self) -> None:
        """Vanish with a RST."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.sock.close()

    def close(self) -> None:
        """Vanish without QUIT."""
        self.sock.close()

    def quit(self) -> None:
        self.say("QUIT", 221)
        self.close()


class AsyncDialogue:
    """The same client for tests in whose event loop the server runs; made by ``await AsyncDialogue.open(port)``."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, timeout: float) -> None:
        self.reader = reader
        self.writer = writer
        self.timeout = timeout
        self.greeting = ""
        self.transcript: list[str] = []

    @classmethod
    async def open(
        cls, port: int, host: str = "127.0.0.1", timeout: float = PATIENCE, greeting: int | None = 220
    ) -> Self:
        reader, writer = await asyncio.wait_for(asyncio.open_connection(host, port, limit=1 << 20), timeout)
        self = cls(reader, writer, timeout)
        if greeting is not None:
            try:
                self.greeting = await self.expect(greeting)
            except BaseException:
                await self.close()
                raise
        return self

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def send(self, *lines: str | bytes) -> None:
        await self.raw(b"".join(_octets(line) + b"\r\n" for line in lines))

    async def raw(self, data: bytes) -> None:
        self.transcript.append(f"> {data[:200]!r}")
        self.writer.write(data)
        await asyncio.wait_for(self.writer.drain(), self.timeout)

    async def reply(self) -> str:
        lines: list[str] = []
        while not lines or lines[-1][3:4] == "-":
            lines.append(await self.line())
        return "\n".join(lines)

    async def line(self) -> str:
        try:
            line = await asyncio.wait_for(self.reader.readline(), self.timeout)
        except TimeoutError:
            raise Unexpected(f"no reply within {self.timeout:g} s\n" + "\n".join(self.transcript)) from None
        if not line:
            raise Unexpected("the server closed\n" + "\n".join(self.transcript))
        self.transcript.append(f"< {line!r}")
        return line.rstrip(b"\r\n").decode("utf-8", "surrogateescape")

    async def expect(self, *codes: int | str) -> str:
        return _check(await self.reply(), codes, self.transcript)

    async def say(self, line: str | bytes, *codes: int | str) -> str:
        await self.send(line)
        return await self.expect(*codes) if codes else await self.reply()

    async def hello(self, name: str = "client.example") -> dict[str, str]:
        return _extensions(await self.say(f"EHLO {name}", 250))

    async def mail(self, sender: str, *recipients: str, data: bytes | None = None, end: int | str = 250) -> str:
        await self.say(f"MAIL FROM:<{sender}>", 250)
        for recipient in recipients:
            await self.say(f"RCPT TO:<{recipient}>", 250)
        return await self.body(data if data is not None else b"Subject: test\r\n\r\ntext\r\n", end)

    async def body(self, data: bytes, end: int | str = 250) -> str:
        await self.say("DATA", 354)
        await self.raw(stuffed(data))
        return await self.expect(end)

    async def is_closed(self) -> bool:
        try:
            return not await asyncio.wait_for(self.reader.read(1), self.timeout)
        except ConnectionError:
            return True
        except TimeoutError:
            return False

    async def close(self) -> None:
        self.writer.close()
        with contextlib.suppress(OSError):
            await self.writer.wait_closed()

    async def quit(self) -> None:
        await self.say("QUIT", 221)
        await self.close()


def stuffed(message: bytes) -> bytes:
    """Return a message with CRLF line ends as sent after DATA: dots doubled, the end-of-data line behind it."""
    body = (b"\r\n" + message).replace(b"\r\n.", b"\r\n..")[2:]
    return body + (b"" if not body or body.endswith(b"\r\n") else b"\r\n") + b".\r\n"


def _octets(line: str | bytes) -> bytes:
    return line if isinstance(line, bytes) else line.encode("utf-8", "surrogateescape")


def _check(reply: str, codes: tuple[int | str, ...], transcript: list[str]) -> str:
    if not any(reply.startswith(str(code)) for code in codes):
        raise Unexpected(f"expected {' or '.join(map(str, codes))}, got {reply!r}\n" + "\n".join(transcript))
    return reply


def _extensions(reply: str) -> dict[str, str]:
    lines = [line[4:] for line in reply.split("\n")[1:]]
    return {line.split(" ")[0].upper(): line.partition(" ")[2] for line in lines}
