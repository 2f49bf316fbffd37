"""The certificate that clients see and the users who may log in, read at the start and on SIGHUP.

A file that cannot be used raises an OSError whose one line names the setting. At the start this ends the program; on
SIGHUP the previous certificate and users stay in use.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

from relay.config.model import SmtpSettings
from relay.ownership import fault_of_secret
from relay.smtpd.passwords import Users


@dataclass(frozen=True, slots=True)
class Credentials:
    """The TLS context for clients and the users who may log in; each None when not configured."""

    tls: ssl.SSLContext | None = None
    users: Users | None = None

    @classmethod
    def load(cls, settings: SmtpSettings) -> Credentials:
        """Read the files that the settings name. Raises OSError."""
        return cls(_tls(settings), _users(settings.users_file) if settings.users_file else None)


def _tls(settings: SmtpSettings) -> ssl.SSLContext | None:
    if settings.tls_certificate is None or not settings.offers_tls:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.options |= ssl.OP_NO_RENEGOTIATION  # against endless handshakes; the default in OpenSSL 3
    key = settings.tls_key or settings.tls_certificate
    for name, path in (("smtp.tls_certificate", settings.tls_certificate), ("smtp.tls_key", key)):
        try:
            path.open("rb").close()
            fault = fault_of_secret(path)
        except OSError as error:
            raise OSError(f"{name}: {path} cannot be read: {error.strerror}") from error
        if fault:
            raise OSError(f"{name}: {fault}")
    try:
        # An empty password, since OpenSSL's prompt would block the start.
        context.load_cert_chain(settings.tls_certificate, settings.tls_key, password="")
    except (ssl.SSLError, ValueError) as error:
        reason = getattr(error, "reason", None) or "no certificate with its key"
        raise OSError(f"smtp.tls_certificate: {settings.tls_certificate} with {key}: {reason}") from error
    return context


def _users(path: Path) -> Users:
    try:
        return Users.read(path)
    except OSError as error:
        raise OSError(f"smtp.users_file: {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise OSError(f"smtp.users_file: {error}") from error
