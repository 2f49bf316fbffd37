"""A pytest plugin under which aiosmtpd's own tests meet our relay: its Controller starts one of ours in its place.

What a Controller is told becomes a setting of ours where we have one. The handler's box holds what our primary got,
without our trace line. Of a reply the code is compared: the words and the enhanced codes (RFC 2034) are our own.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import threading
from importlib.resources import files
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from aiosmtpd import controller
from aiosmtpd.testing.statuscodes import StatusCode

from relay.smtpd.passwords import hash_password
from support.in_process_relay import serve, settings_of
from support.scripted_server import ScriptedServer
from support.waiting import PATIENCE, free_port

# Its conftest takes one function of each; neither package is needed for that.
_resources = ModuleType("pkg_resources")
_resources.resource_filename = lambda package, name: str(files(package) / name)
sys.modules.setdefault("pkg_resources", _resources)
_mock = ModuleType("pytest_mock")
_mock.MockFixture = object
sys.modules.setdefault("pytest_mock", _mock)

StatusCode.__eq__ = lambda code, reply: reply[0] == code[0]
StatusCode.__hash__ = lambda code: hash(code[0])


@pytest.fixture(scope="session")
def session_mocker() -> Any:
    return SimpleNamespace(patch=lambda *_, **__: None)


class Box:
    """What has arrived at the primary, as a handler would have had it."""

    def __init__(self, primary: ScriptedServer, *, decoded: bool) -> None:
        self._primary = primary
        self._decoded = decoded

    def __len__(self) -> int:
        return len(self._primary.messages)

    def __getitem__(self, index: int) -> Any:
        message = self._primary.messages[index]
        content = message.body.split(b"\r\n", 3)[3]
        return SimpleNamespace(
            mail_from=message.sender,
            rcpt_tos=message.recipients,
            content=content.decode() if self._decoded else content,
            original_content=content,
            mail_options=list(message.parameters),
        )


class RelayController:
    """In place of aiosmtpd's Controller: the same arguments, a relay of ours."""

    def __init__(
        self, handler: Any, hostname: str = "", port: int = 0, *, ssl_context: Any = None, **options: Any
    ) -> None:
        self.handler = handler
        self.hostname = "127.0.0.1"
        self.port = 0
        self._tls = ssl_context is not None
        self._options = options
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._stopping: asyncio.Event
        self._primary: ScriptedServer
        self._served: Any = None

    def start(self) -> None:
        extensions = ["PIPELINING", "8BITMIME", *(["SMTPUTF8"] if self._options.get("enable_SMTPUTF8", True) else [])]
        self._primary = ScriptedServer(extensions=extensions).start()
        if hasattr(self.handler, "box"):
            self.handler.box = Box(self._primary, decoded=bool(self._options.get("decode_data")))
        self._thread.start()
        started = threading.Event()
        self._served = asyncio.run_coroutine_threadsafe(self._serve(started), self._loop)
        self._served.add_done_callback(lambda _: started.set())
        assert started.wait(PATIENCE)
        if self._served.done():
            self._served.result()

    def stop(self, no_assert: bool = False) -> None:
        assert self._served is not None or no_assert
        served, self._served = self._served, None
        if served is None:
            return
        self._loop.call_soon_threadsafe(self._stopping.set)
        served.result(PATIENCE)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE)
        self._loop.close()
        self._primary.stop()

    async def _serve(self, started: threading.Event) -> None:
        self._stopping = asyncio.Event()
        with tempfile.TemporaryDirectory() as folder:
            settings = settings_of(self._primary.address, self._settings(Path(folder)))
            nowhere = f"redis://127.0.0.1:{free_port()}"  # there is no backup to keep anything for
            async with serve(settings, nowhere, tls=self._tls) as (made, self.port):
                started.set()
                await self._stopping.wait()
                for client in made.command_loops:  # its own stop hangs up, and waits for no client
                    if (transport := client._protocol.transport) is not None:
                        transport.abort()

    def _settings(self, folder: Path) -> dict[str, str]:
        options, settings = self._options, {"smtp.domain": getattr(self, "custom_name", "localhost")}
        if "data_size_limit" in options:
            settings["smtp.max_message_bytes"] = str(options["data_size_limit"] or 0)
        if hasattr(self, "Delay"):
            settings["smtp.idle_timeout"] = str(self.Delay)
        if options.keys() & {"auth_callback", "authenticator", "auth_required"} or options.get("auth_require_tls"):
            (folder / "users").write_text(f"goodlogin:{hash_password('goodpasswd')}\n")
            settings["smtp.users_file"] = str(folder / "users")
            settings["smtp.auth_without_tls"] = str(not options.get("auth_require_tls", True)).lower()
        if options.get("auth_required"):
            settings["smtp.allowed_networks"] = "192.0.2.0/24"
        if self._tls or options.get("tls_context") is not None:
            certificates = files("aiosmtpd.tests.certs")
            settings["smtp.tls_certificate"] = str(certificates / "server.crt")
            settings["smtp.tls_key"] = str(certificates / "server.key")
        if options.get("require_starttls"):
            settings["smtp.tls"] = "encrypt"
        if options.get("proxy_protocol_timeout"):
            settings["smtp.proxy_protocol"] = "true"
        return settings


controller.Controller = RelayController


def pytest_configure(config: pytest.Config) -> None:
    """Know the marks that its own configuration declares."""
    for mark in ("client_data", "controller_data", "handler_data"):
        config.addinivalue_line("markers", f"{mark}: of aiosmtpd's tests")
