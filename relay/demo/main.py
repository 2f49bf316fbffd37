"""`smtp-dup demo`: the whole product with mail servers of its own, a few messages, and what happens to each.

Everything is in a temporary folder, which is deleted at the end. No settings file or variable is read. The log goes
into that folder, since the display uses the terminal; if something fails, the end of the log is shown.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from relay.child import ChildContext
from relay.config.loader import Settings, load
from relay.config.model import Layers
from relay.daemon import services, start
from relay.daemon.slots import Child
from relay.demo import servers
from relay.demo.setup import DemoSetup, free_port
from relay.redisio import embedded

_SMTP_PORT = 2525
_STATUS_PORT = 8025
_LOG_LINES = 20
_SETTINGS = """\
state_dir = "{folder}"

[smtp]
listen = "127.0.0.1:{smtp}"
processes = 1

[relay]
destination_primary = "old={old}"

[[backup]]
name = "new"
url = "{new}"

[status]
listen = "127.0.0.1:{status}"

[spool]
min_free = "1M"

[retry]
first = "1s"
longest = "10s"
"""
_ROUTES = """
[[server]]
name = "shop"
url = "{shop}"

[[route]]
name = "shop"
match = {{ recipients = "@shop.example" }}
primary = "shop"
backups = ["new"]
"""
_TWO = "two mail servers to play the old and the new one"
_TRIES = 5  # to find ports that stay free until they are bound


def run(colour: str = "auto", *, routes: bool = False) -> int:
    """Run the demo until Ctrl-C, with ``routes`` a domain has a server of its own. Returns the exit status."""
    say = sys.stdout.write
    start.EarlyStop()  # so that any stop signal also deletes the folder
    names = ("old", "new", *(("shop",) if routes else ()))
    with _folder() as folder, ExitStack() as ends:
        listeners = {name: ends.enter_context(socket.create_server(("127.0.0.1", 0))) for name in names}
        those = "three mail servers to play the old, the new and a shop's" if routes else _TWO
        say(f"Starting Redis, the relay, a worker, and {those} ...\n")
        for tries_left in reversed(range(_TRIES)):
            stage = _set(folder, listeners, colour)
            if stage.smtp[1] != _SMTP_PORT:
                say(f"Port {_SMTP_PORT} is taken, so the demo uses {stage.smtp[1]}.\n")
            sys.stdout.flush()
            try:
                with _stderr_into(stage.log):
                    read = _read(folder / "settings.toml")
                    status = services.run(stage.settings, start.UP, extra=_children(stage, listeners), read=read)
                break
            except start.StartError:
                # Another program, perhaps another demo, may have taken a port since it was found free.
                if not tries_left or stage.has_its_ports:
                    raise
        if status:
            sys.stderr.write("The demo failed. The end of its log:\n")
            sys.stderr.writelines(stage.log.read_text("utf-8", "replace").splitlines(keepends=True)[-_LOG_LINES:])
    say("\nStopped. Everything is gone, the temporary folder too.\n")
    return status


def _children(stage: DemoSetup, listeners: Mapping[str, socket.socket]) -> list[Child]:
    def be_servers(_: ChildContext) -> int:
        return servers.serve(listeners, stage.seen)

    def be_display(_: ChildContext) -> int:
        from relay.demo import display  # noqa: PLC0415  (rich)

        return display.show(stage)

    # The servers outlive the worker; the display ends by itself, and everything else stays.
    return [Child("servers", run=be_servers, stage=3), Child("display", run=be_display, stage=0, restart=False)]


def _set(folder: Path, listeners: Mapping[str, socket.socket], colour: str) -> DemoSetup:
    smtp = free_port(_SMTP_PORT)
    status = free_port(_STATUS_PORT)
    addresses = {name: f"127.0.0.1:{listener.getsockname()[1]}" for name, listener in listeners.items()}
    # All of it is in a file, so that a command with this folder has the same settings, names and all.
    file = folder / "settings.toml"
    form = _SETTINGS + (_ROUTES if "shop" in addresses else "")
    file.write_text(form.format(folder=folder, smtp=smtp, status=status, **addresses))
    return DemoSetup(_read(file)(None), folder, ("127.0.0.1", smtp), f"http://127.0.0.1:{status}", colour)


def _read(file: Path) -> Callable[[Layers | None], Settings]:
    """Return what loads the demo's settings, and loads them again: nothing else counts."""
    return lambda running: load({"config": str(file)}, environ={}, directories=(), running=running)


@contextmanager
def _folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="smtp-dup-demo-"))
    try:
        yield folder
    finally:
        embedded.remove_socket_folder(folder)  # elsewhere, where the folder's path is too long for it
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _stderr_into(log: Path) -> Iterator[None]:
    """Redirect standard error of this process and its children to a file."""
    sys.stderr.flush()
    terminal = os.dup(2)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(terminal, 2)
        os.close(terminal)
