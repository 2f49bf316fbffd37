"""Opens a session with a server: TCP, greeting, EHLO, TLS, AUTH, each with its own deadline.

aiosmtplib does the handshake; then a Connection takes over its transport. Every failure is a ConnectFailed whose
``stage`` names the step: it is about the server, never about a message. Its text holds no secret.

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
from typing import Any, TypeAlias, cast

import aiosmtplib

from relay.client.connection import (
    ClientError,
    ConnectFailed,
    Connection,
    ConnectionGone,
    DeadlinePassed,
    MalformedReply,
)
from relay.client.reply_parser import safe_text
from relay.mail.destination import Destination
from relay.mail.reply import Reply
from relay.mail.timeouts import Timeouts

__all__ = [
    "ClientError",
    "ConnectFailed",
    "Connection",
    "ConnectionGone",
    "DeadlinePassed",
    "MalformedReply",
    "connect",
]


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
    begun = loop.time()
    deadline, left = begun + timeouts.connect, len(addresses)
    trouble: ConnectFailed | None = None
    for address in addresses:
        patience = max(deadline - loop.time(), timeouts.connect / len(addresses)) / left
        share, left = left, left - 1
        try:
            return await _connect_to(address, destination, local_hostname, timeouts, begun, patience, share, context)
        except ConnectFailed as error:
            if error.reply is not None or trouble is None or trouble.reply is None:
                trouble = error  # a reply says more than an address that does not answer
            if error.stage == "AUTH":
                break
    raise trouble or ConnectFailed("the name has no address", stage="connect")


async def _connect_to(
    address: _Address,
    destination: Destination,
    local_hostname: str,
    timeouts: Timeouts,
    begun: float,
    patience: float,
    share: int,
    context: ssl.SSLContext | None,
) -> Connection:
    """Open a session with one address; ``patience`` is for its connect, 1/``share`` of the usual for its greeting."""
    start_tls = destination.scheme != "smtps" and destination.tls != "none"
    try:
        return await _open(
            address, destination, local_hostname, timeouts, begun, patience, share, context, start_tls=start_tls
        )
    except _TLSFailed:
        if destination.tls != "opportunistic" or destination.username:
            raise
    return await _open(address, destination, local_hostname, timeouts, begun, patience, share, context, start_tls=False)


async def _open(
    address: _Address,
    destination: Destination,
    local_hostname: str,
    timeouts: Timeouts,
    begun: float,
    patience: float,
    share: int,
    context: ssl.SSLContext | None,
    *,
    start_tls: bool,
) -> Connection:
    def left(most: float) -> float:
        """Return the seconds that the next step may take, within the limit of the whole handshake."""
        spent = asyncio.get_running_loop().time() - begun
        return max(timeouts.connect, min(most, timeouts.session - spent))

    with _stage("connect"):
        connected = await _dial(address, patience)
    smtp = aiosmtplib.SMTP(
        hostname=destination.host.rstrip("."),  # no trailing dot in SNI and certificates (RFC 6066 3)
        local_hostname=local_hostname,
        sock=connected,
        use_tls=destination.scheme == "smtps",
        start_tls=False,
        tls_context=context,
        timeout=left(timeouts.greeting) / share,
    )
    protocol = None
    try:
        with _stage("greeting"):
            await smtp.connect()
        protocol = smtp.protocol
        smtp.timeout = left(timeouts.command) / share
        extensions = await _hello(smtp, destination)
        smtp.timeout = left(timeouts.command)
        if start_tls and await _start_tls(smtp, destination, offered="STARTTLS" in extensions):
            smtp.timeout = left(timeouts.command)
            extensions = await _hello(smtp, destination)  # RFC 3207 4.2: those announced before TLS do not count
        if destination.username:
            smtp.timeout = left(timeouts.command)
            await _log_in(smtp, destination)
        return _take_over(smtp, destination, extensions, local_hostname)
    except BaseException:
        smtp.close()
        if protocol is not None and protocol.transport is not None:
            # close() waits for the server's TLS close_notify, which may never come.
            cast("asyncio.Transport", protocol.transport).abort()
        raise


def _take_over(
    smtp: aiosmtplib.SMTP, destination: Destination, extensions: dict[str, str], hostname: str
) -> Connection:
    if smtp.transport is None or not smtp.is_connected:
        raise ConnectFailed("the server closed the connection", stage="EHLO")
    return Connection(destination, cast("asyncio.Transport", smtp.transport), extensions, hostname)


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


async def _hello(smtp: aiosmtplib.SMTP, destination: Destination) -> dict[str, str]:
    """Send EHLO (LHLO for LMTP, HELO to an old server) and return the extensions."""
    verb = "LHLO" if destination.scheme == "lmtp" else "EHLO"
    name = (smtp.local_hostname or "localhost").encode("ascii")
    with _stage(verb):
        response = await smtp.execute_command(verb.encode("ascii"), name)
        if response.code in (500, 502) and verb == "EHLO":
            await smtp.helo()
            return {}
        if response.code != 250:
            raise aiosmtplib.SMTPHeloError(response.code, response.message)
    smtp.last_ehlo_response = response  # the setter parses it; starttls() and login() use it too
    return {keyword.upper(): parameters for keyword, parameters in smtp.esmtp_extensions.items()}


async def _start_tls(smtp: aiosmtplib.SMTP, destination: Destination, *, offered: bool) -> bool:
    """Negotiate TLS; returns False if the session continues in plain text, which only "opportunistic" allows."""
    optional = destination.tls == "opportunistic"
    if not offered:
        if optional:
            return False
        raise ConnectFailed("the server does not offer STARTTLS", stage="STARTTLS")
    # An upper limit besides the deadlines of reply and handshake, which miss a connection that was lost before.
    seconds = None if smtp.timeout is None else 3 * smtp.timeout
    try:
        with _stage("STARTTLS"):
            async with asyncio.timeout(seconds):
                await smtp.starttls()
    except ConnectFailed as error:
        if error.reply is None:
            raise _TLSFailed(error.reason, stage="TLS") from error
        if optional and smtp.is_connected:
            return False
        raise
    return True


async def _log_in(smtp: aiosmtplib.SMTP, destination: Destination) -> None:
    with _stage("AUTH"):
        if destination.tls != "none" and smtp.get_transport_info("sslcontext") is None:
            raise ConnectFailed("no password is sent without TLS", stage="AUTH")
        await smtp.login(destination.username, destination.password)


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
