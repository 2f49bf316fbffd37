"""Opens a session with a server: TCP, greeting, EHLO, TLS, AUTH, each with its own deadline.

aiosmtplib does the handshake: its protocol without the client around it, which takes longer than the rest and is needed
for AUTH only. Then a Connection takes over the transport. Every failure is a ConnectFailed whose ``stage`` names the
step: it is about the server, never about a message. Its text holds no secret.

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
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias, cast

import aiosmtplib
from aiosmtplib.protocol import SMTPProtocol

from relay.client.connection import Connection
from relay.client.errors import ConnectFailed
from relay.client.exchangers import exchangers
from relay.client.reply_parser import safe_text
from relay.mail.destination import Destination
from relay.mail.reply import Reply
from relay.mail.timeouts import Timeouts

_AVOID_SECONDS = 60.0  # in which an address that did not work is the last to be tried
_MOST_AVOIDED = 4096

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

    The addresses of the host, or of the hosts that DNS names for a domain, are tried in turn until one works (RFC 5321
    5.1); those that did not work lately come last. Each gets an equal share of the time left for its connect, greeting
    and EHLO; the last one gets all of it. After a refused password no other address is tried.
    """
    context: ssl.SSLContext | None = None
    if destination.scheme == "smtps" or destination.tls != "none":
        with _stage("TLS"):
            context = await _context(destination)
    with _stage("connect"):
        found = await _addresses(destination, timeouts.connect)
    addresses = sorted(found, key=_is_avoided) if len(found) > 1 and _avoided else found
    loop = asyncio.get_running_loop()
    deadline, left = loop.time() + timeouts.connect, len(addresses)
    attempt = _Attempt(destination, local_hostname, timeouts, context)
    trouble: ConnectFailed | None = None
    for name, address in addresses:
        patience = max(deadline - loop.time(), timeouts.connect / len(addresses)) / left
        share, left = left, left - 1
        try:
            return await attempt.at(address, name, patience, share)
        except ConnectFailed as error:
            avoid(address[3])
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
        self._local_hostname = local_hostname
        self._timeouts = timeouts
        self._context = context
        self._loop = asyncio.get_running_loop()
        self._begun = self._loop.time()
        self._name = destination.host

    async def at(self, address: _Address, name: str, patience: float, share: int) -> Connection:
        """Open a session with one address of the host of that name.

        ``patience`` is for its connect, 1/``share`` of the usual for its EHLO.
        """
        destination = self._destination
        self._name = name.rstrip(".")  # for SNI and certificates (RFC 6066 3)
        start_tls = destination.scheme != "smtps" and destination.tls != "none"
        try:
            return await self._open(address, patience, share, start_tls=start_tls)
        except _TLSFailed:
            if destination.tls != "opportunistic" or destination.username:
                raise
        return await self._open(address, patience, share, start_tls=False)

    async def _open(self, address: _Address, patience: float, share: int, *, start_tls: bool) -> Connection:
        protocol = SMTPProtocol(loop=self._loop)
        try:
            await self._connect(protocol, address, patience, share)
            transport, hello = await self._shake_hands(protocol, share, start_tls=start_tls)
            return Connection(self._destination, transport, hello, self._local_hostname)
        except BaseException:
            if protocol.transport is not None:
                # close() would wait for the server's TLS close_notify, which may never come.
                cast("asyncio.Transport", protocol.transport).abort()
            raise

    async def _connect(self, protocol: SMTPProtocol, address: _Address, patience: float, share: int) -> None:
        family, _, number, where = address
        if self._destination.scheme == "smtps":
            seconds = self._left(self._timeouts.greeting) / share
            with _stage("connect"):
                connected = await _dial(address, patience)
            with _stage("TLS"):
                async with asyncio.timeout(seconds):
                    await self._loop.create_connection(
                        lambda: protocol,
                        sock=connected,
                        ssl=self._context,
                        server_hostname=self._name,
                        ssl_handshake_timeout=seconds,
                    )
            return
        host = f"{where[0]}%{where[3]}" if len(where) > 3 and where[3] else where[0]  # IPv6 with its scope
        with _stage("connect"):
            async with asyncio.timeout(patience):
                transport, _ = await self._loop.create_connection(
                    lambda: protocol, host, where[1], family=family, proto=number
                )
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    async def _shake_hands(
        self, protocol: SMTPProtocol, share: int, *, start_tls: bool
    ) -> tuple[asyncio.Transport, Sequence[str]]:
        """Return the transport, and the lines of EHLO's reply that announce extensions."""
        destination, timeouts = self._destination, self._timeouts
        with _stage("greeting"):
            greeting = await protocol.read_response(self._left(timeouts.greeting) / share)
            if greeting.code != 220:
                raise aiosmtplib.SMTPConnectResponseError(*greeting)
        hello = await self._introduce(protocol, self._left(timeouts.command) / share)
        if start_tls and await self._start_tls(protocol, hello, self._left(timeouts.command)):
            # RFC 3207 4.2: the extensions announced before TLS do not count.
            hello = await self._introduce(protocol, self._left(timeouts.command))
        if destination.username:
            await self._log_in(protocol, hello, self._left(timeouts.command))
        if protocol.transport is None or not protocol.is_connected:
            raise ConnectFailed("the server closed the connection", stage="EHLO")
        return cast("asyncio.Transport", protocol.transport), hello.message.split("\n")[1:]

    def _left(self, most: float) -> float:
        """Return the seconds that the next step may take, within the limit of the whole handshake."""
        spent = self._loop.time() - self._begun
        return max(self._timeouts.connect, min(most, self._timeouts.session - spent))

    async def _introduce(self, protocol: SMTPProtocol, timeout: float) -> aiosmtplib.SMTPResponse:
        """Send EHLO (LHLO for LMTP, HELO to an old server); returns the reply."""
        verb = "LHLO" if self._destination.scheme == "lmtp" else "EHLO"
        name = (self._local_hostname or "localhost").encode("ascii")
        with _stage(verb):
            reply = await protocol.execute_command(verb.encode(), name, timeout=timeout)
            if reply.code in (500, 502) and verb == "EHLO":
                reply = await protocol.execute_command(b"HELO", name, timeout=timeout)
                if reply.code == 250:
                    return aiosmtplib.SMTPResponse(250, "")
            if reply.code != 250:
                raise aiosmtplib.SMTPHeloError(*reply)
        return reply

    async def _start_tls(self, protocol: SMTPProtocol, hello: aiosmtplib.SMTPResponse, timeout: float) -> bool:
        """Negotiate TLS; returns False if the session continues in plain text, which only "opportunistic" allows."""
        optional = self._destination.tls == "opportunistic"
        words = {line.partition(" ")[0].upper() for line in hello.message.split("\n")[1:]}
        if "STARTTLS" not in words or self._context is None:
            if optional:
                return False
            raise ConnectFailed("the server does not offer STARTTLS", stage="STARTTLS")
        try:
            with _stage("STARTTLS"):
                # An upper limit besides the deadlines of reply and handshake, which miss a connection lost before.
                async with asyncio.timeout(3 * timeout):
                    await protocol.start_tls(self._context, server_hostname=self._name, timeout=timeout)
        except ConnectFailed as error:
            if error.reply is None:
                raise _TLSFailed(error.reason, stage="TLS") from error
            if optional and protocol.is_connected:
                return False
            raise
        return True

    async def _log_in(self, protocol: SMTPProtocol, hello: aiosmtplib.SMTPResponse, timeout: float) -> None:
        destination = self._destination
        with _stage("AUTH"):
            is_secret = protocol.transport is not None and protocol.transport.get_extra_info("sslcontext") is not None
            if destination.tls != "none" and not is_secret:
                raise ConnectFailed("no password is sent without TLS", stage="AUTH")
            smtp = aiosmtplib.SMTP(hostname=self._name, local_hostname=self._local_hostname, timeout=timeout)
            smtp.protocol, smtp.transport, smtp.last_ehlo_response = protocol, protocol.transport, hello
            await smtp.login(destination.username, destination.password)


_avoided: dict[tuple[Any, ...], float] = {}  # host and port -> until when (monotonic) others are tried before it


def avoid(peer: tuple[Any, ...]) -> None:
    """Have other addresses of the same name tried first for a while: this one takes no mail at the moment."""
    now = time.monotonic()
    if len(_avoided) >= _MOST_AVOIDED:
        for known in [known for known, until in _avoided.items() if until <= now] or [next(iter(_avoided))]:
            del _avoided[known]
    _avoided[peer[:2]] = now + _AVOID_SECONDS


def _is_avoided(target: tuple[str, _Address]) -> bool:
    return _avoided.get(target[1][3][:2], 0.0) > time.monotonic()


async def _addresses(destination: Destination, timeout: float) -> list[tuple[str, _Address]]:
    """Return the name and the address of each host to be tried, in this order, each once."""
    if destination.scheme != "mx":
        return [(destination.host, address) for address in await _of_name(destination, timeout)]
    found: dict[_Address, str] = {}
    for host in await exchangers(destination, timeout):
        for address in host.addresses:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            where = (address, destination.port, 0, 0) if ":" in address else (address, destination.port)
            found.setdefault((family, socket.SOCK_STREAM, socket.IPPROTO_TCP, where), host.name)
    return [(name, address) for address, name in found.items()]


async def _of_name(destination: Destination, timeout: float) -> list[_Address]:
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


async def _dial(address: _Address, timeout: float) -> socket.socket:
    family, kind, protocol, where = address
    connected = socket.socket(family, kind, protocol)
    try:
        connected.setblocking(False)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        async with asyncio.timeout(timeout):
            await asyncio.get_running_loop().sock_connect(connected, where)
    except BaseException:
        connected.close()
        raise
    return connected


@contextmanager
def _stage(stage: str) -> Iterator[None]:
    """Turn any exception of a step into a ConnectFailed of this stage."""
    try:
        yield
    except ConnectFailed:
        raise
    except aiosmtplib.SMTPResponseException as error:
        if error.code < 0:  # aiosmtplib's mark for a malformed reply
            raise ConnectFailed("not an SMTP reply", stage=stage) from error
        raise ConnectFailed("refused", stage=stage, reply=_reply(error.code, error.message)) from error
    except (OSError, aiosmtplib.SMTPException, ValueError) as error:
        cause = error.__cause__
        if isinstance(error, aiosmtplib.SMTPConnectError) and not isinstance(cause, aiosmtplib.SMTPException):
            stage = "TLS"  # the socket was connected before, so this is the TLS handshake of smtps
        raise ConnectFailed(_why(error if isinstance(error, TimeoutError) else cause or error), stage=stage) from error


def _why(error: BaseException) -> str:
    """Describe an error in a few words, without addresses or the library's own text."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate not accepted: {error.verify_message}"
    if isinstance(error, TimeoutError) or (isinstance(error, ConnectionAbortedError) and not error.errno):
        return "no answer in time"  # asyncio raises ConnectionAbortedError for a TLS handshake time-out
    if isinstance(error, ssl.SSLError):
        return f"TLS handshake failed: {error.reason or 'connection closed'}"
    if isinstance(error, socket.gaierror):
        return f"cannot resolve the name: {error.strerror}"
    if isinstance(error, aiosmtplib.SMTPServerDisconnected):
        return "the server closed the connection"
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return str(error) or type(error).__name__


def _reply(code: int, message: str) -> Reply:
    return Reply(code, tuple(safe_text(line.encode("utf-8", "surrogateescape")) for line in message.split("\n")))


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
