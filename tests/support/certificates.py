"""A throw-away certificate for localhost, made by the openssl program."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from pathlib import Path

import pytest


class Certificate:
    """``certificate`` and ``key`` are PEM files; it is self-signed, so ``certificate`` is also its authority."""

    def __init__(self, directory: Path, name: str = "localhost") -> None:
        if shutil.which("openssl") is None:
            pytest.skip("needs the openssl program")
        self.certificate = directory / f"{name}.pem"
        self.key = directory / f"{name}.key"
        subprocess.run(
            [
                *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
                *("-days", "2", "-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name},IP:127.0.0.1"),
                *("-out", str(self.certificate), "-keyout", str(self.key)),
            ],
            check=True,
            capture_output=True,
        )

    def server_context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate, self.key)
        return context

    def client_context(self) -> ssl.SSLContext:
        """Return a context that trusts this certificate only."""
        return ssl.create_default_context(cafile=str(self.certificate))
