"""Opens a session with a server: TCP, greeting, EHLO, TLS, AUTH, each with its own deadline.

Every failure is a ConnectFailed whose ``stage`` names the step: it is about the server, never about a message. Its text
holds no secret.

TLS by ``destination.tls``: none; opportunistic (if offered, without checking the certificate, and in plain text if the
handshake fails, as Postfix's "may"); encrypt (or fail, certificate not checked); verify (or fail). The scheme smtps is
TLS from the first octet. A password is sent without TLS only if ``tls`` is "none".
"""

from __future__ import annotations

import asyncio
import functools
import os
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from relay.client import login
from relay.client.connection import Connection
from relay.client.errors import ClientError, ConnectFailed, ConnectionGone, DeadlinePassed, MalformedReply
from relay.mail.destination import Destination
from relay.mail.timeouts import Timeouts

_Address: TypeAlias = tuple[int, int, int, Any]  # family, type, protocol, socket address


class _TLSFailed(ConnectFailed):
    """The server accepted STARTTLS and the handshake failed; plain text may work."""


async def connect(
    destination: Destination,
    *,
    local_hostname: str,
    timeouts: Timeouts,
) -> Connection:
    """Open a session, ready for MAIL, with a deadline for each step and for all together. Raises ConnectFailed.

    The addresses of the host are tried in turn until one works (RFC 5321 5.1). Each gets an equal share of the time
    left for its connect, greeting and EHLO; the last one gets all of it. After a refused password no other address is
    tried.
    """
    context: ssl.SSLContext | None = None
    if destination.scheme == "smtps" or destination.tls != "none":
        with _stage("TLS"):
            context = await _context(destination)
    with _stage("connect"):
        addresses = await _addresses(destination, timeouts.connect)
    loop = asyncio.get_running_loop()
    deadline, left = loop.time() + timeouts.connect, len(addresses)
    attempt = _Attempt(destination, local_hostname, timeouts, context)
    trouble: ConnectFailed | None = None
    for address in addresses:
        patience = max(deadline - loop.time(), timeouts.connect / len(addresses)) / left
        share, left = left, left - 1
        try:
            return await attempt.at(address, patience, share)
        except ConnectFailed as error:
            if error.reply is not None or trouble is None or trouble.reply is None:
                trouble = error  # a reply says more than an address that does not answer
            if error.stage == "AUTH":
                break
    raise trouble or ConnectFailed("the name has no address", stage="connect")


class _Attempt:
    """The handshake of one ``connect``, with one address after the other."""

    def __init__(
        self, destination: Destination, local_hostname: str, timeouts: Timeouts, context: ssl.SSLContext | None
    ) -> None:
        self._destination = destination
        self._hello = local_hostname.encode("ascii") or b"localhost"
        self._timeouts = timeouts
        self._context = context
        self._loop = asyncio.get_running_loop()
        self._begun = self._loop.time()

    async def at(self, address: _Address, patience: float, share: int) -> Connection:
        """Open a session with one address; ``patience`` is for its connect, 1/``share`` of the usual for its EHLO."""
        destination = self._destination
        start_tls = destination.scheme != "smtps" and destination.tls != "none"
        try:
            return await self._open(address, patience, share, start_tls=start_tls)
        except _TLSFailed:
            if destination.tls != "opportunistic" or destination.username:
                raise
        return await self._open(address, patience, share, start_tls=False)

    async def _open(self, address: _Address, patience: float, share: int, *, start_tls: bool) -> Connection:
        connection = await self._dial(address, patience)
        try:
            await self._shake_hands(connection, share, start_tls=start_tls)
        except BaseException:
            connection.close()
            raise
        return connection

    async def _shake_hands(self, connection: Connection, share: int, *, start_tls: bool) -> None:
        destination, timeouts = self._destination, self._timeouts
        if destination.scheme == "smtps":
            with _stage("TLS"):
                await self._secure(connection, self._left(timeouts.greeting) / share)
        with _stage("greeting"):
            greeting = await connection.reply(timeout=self._left(timeouts.greeting) / share)
        if greeting.code != 220:
            raise ConnectFailed("refused", stage="greeting", reply=greeting)
        await self._introduce(connection, self._left(timeouts.command) / share)
        if start_tls and await self._start_tls(connection, self._left(timeouts.command)):
            # RFC 3207 4.2: the extensions announced before TLS do not count.
            await self._introduce(connection, self._left(timeouts.command))
        if destination.username:
            await self._log_in(connection, self._left(timeouts.command))
        if not connection.is_usable:
            raise ConnectFailed("the server closed the connection, or said more than was asked", stage="EHLO")

    def _left(self, most: float) -> float:
        """Return the seconds that the next step may take, within the limit of the whole handshake."""
        spent = self._loop.time() - self._begun
        return max(self._timeouts.connect, min(most, self._timeouts.session - spent))

    async def _dial(self, address: _Address, timeout: float) -> Connection:
        family, _, protocol, where = address
        host = f"{where[0]}%{where[3]}" if len(where) > 3 and where[3] else where[0]  # IPv6 with its scope

        def made() -> Connection:
            return Connection(self._destination, self._hello.decode())

        with _stage("connect"):
            async with asyncio.timeout(timeout):
                transport, connection = await self._loop.create_connection(
                    made, host, where[1], family=family, proto=protocol
                )
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        return connection

    async def _introduce(self, connection: Connection, timeout: float) -> None:
        """Send EHLO (LHLO for LMTP, HELO to an old server) and note the extensions."""
        verb = "LHLO" if self._destination.scheme == "lmtp" else "EHLO"
        with _stage(verb):
            reply = await connection.command(verb.encode() + b" " + self._hello, timeout=timeout)
            is_old = reply.code in (500, 502) and verb == "EHLO"
            if is_old:
                reply = await connection.command(b"HELO " + self._hello, timeout=timeout)
            if reply.code != 250:
                raise ConnectFailed("refused", stage=verb, reply=reply)
        connection.announce(() if is_old else reply.lines[1:])

    async def _start_tls(self, connection: Connection, timeout: float) -> bool:
        """Negotiate TLS; returns False if the session continues in plain text, which only "opportunistic" allows."""
        optional = self._destination.tls == "opportunistic"
        if "STARTTLS" not in connection.extensions:
            if optional:
                return False
            raise ConnectFailed("the server does not offer STARTTLS", stage="STARTTLS")
        try:
            with _stage("TLS"):
                reply = await connection.command(b"STARTTLS", timeout=timeout)
                if reply.code == 220:
                    await self._secure(connection, timeout)
                    return True
        except ConnectFailed as error:
            raise _TLSFailed(error.reason, stage="TLS") from error
        if optional and connection.is_usable:
            return False
        raise ConnectFailed("refused", stage="STARTTLS", reply=reply)

    async def _secure(self, connection: Connection, timeout: float) -> None:
        if self._context is not None:  # the destination says so
            # No trailing dot in SNI and certificates (RFC 6066 3).
            await connection.start_tls(self._context, self._destination.host.rstrip("."), timeout)

    async def _log_in(self, connection: Connection, timeout: float) -> None:
        destination = self._destination
        with _stage("AUTH"):
            if destination.tls != "none" and not connection.is_encrypted:
                raise ConnectFailed("no password is sent without TLS", stage="AUTH")
            refusal = await login.log_in(connection, destination.username, destination.password, timeout)
        if refusal is not None:
            raise ConnectFailed("refused", stage="AUTH", reply=refusal)


async def _addresses(destination: Destination, timeout: float) -> list[_Address]:
    """Return the host's addresses in the resolver's order, each once."""
    try:  # an IP address needs neither the resolver nor a thread for it
        found = socket.getaddrinfo(
            destination.host, destination.port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST
        )
    except socket.gaierror:
        async with asyncio.timeout(timeout):
            found = await asyncio.get_running_loop().getaddrinfo(
                destination.host, destination.port, type=socket.SOCK_STREAM
            )
    return list(dict.fromkeys((family, kind, protocol, address) for family, kind, protocol, _, address in found))


@contextmanager
def _stage(stage: str) -> Iterator[None]:
    """Turn any exception of a step into a ConnectFailed of this stage."""
    try:
        yield
    except ConnectFailed:
        raise
    except (OSError, ClientError, ValueError) as error:
        raise ConnectFailed(_why(error), stage=stage) from error


def _why(error: Exception) -> str:
    """Describe an error in a few words, without addresses or the library's own text."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate not accepted: {error.verify_message}"
    is_late = isinstance(error, DeadlinePassed | TimeoutError)
    if is_late or (isinstance(error, ConnectionAbortedError) and not error.errno):
        return "no answer in time"  # asyncio raises ConnectionAbortedError for a TLS handshake time-out
    if isinstance(error, ssl.SSLError):
        return f"TLS handshake failed: {error.reason or 'connection closed'}"
    if isinstance(error, socket.gaierror):
        return f"cannot resolve the name: {error.strerror}"
    if isinstance(error, MalformedReply):
        return "not an SMTP reply"
    if isinstance(error, ConnectionGone):
        return "the server closed the connection"
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return str(error) or type(error).__name__


async def _context(destination: Destination) -> ssl.SSLContext:
    """Return the TLS context for a destination; it is cached until one of its files changes."""
    files = (destination.ca_file, destination.tls_certificate, destination.tls_key)
    if destination.tls != "verify" and not any(files):
        return _made(destination.tls, files, ())
    return await asyncio.to_thread(_of_files, destination.tls, files)


def _of_files(tls: str, files: tuple[str, str, str]) -> ssl.SSLContext:
    return _made(tls, files, tuple(Path(file).stat().st_mtime_ns if file else 0 for file in files))


@functools.lru_cache(maxsize=64)
def _made(tls: str, files: tuple[str, str, str], _changed: tuple[int, ...]) -> ssl.SSLContext:
    ca_file, certificate, key = files
    if tls == "verify":
        context = ssl.create_default_context(cafile=ca_file or None)
    else:
        context = _unverified(strict=tls == "encrypt")
    if certificate:
        context.load_cert_chain(certificate, key or None, password="")  # None would prompt for a password
    return context


def _unverified(*, strict: bool) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if not strict:  # people migrate away from old servers, and weak TLS is better than none
        context.set_ciphers("DEFAULT:@SECLEVEL=0")
        context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
    return context
