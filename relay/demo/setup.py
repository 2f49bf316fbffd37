"""The folder and ports of `smtp-dup demo`, and the command lines that reach it from another terminal."""

from __future__ import annotations

import shlex
import shutil
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

from relay.config.loader import Settings, SettingsError, load
from relay.daemon import start
from relay.redisio import embedded


@dataclass(frozen=True, slots=True)
class DemoSetup:
    """The folder, ports and files of the demo."""

    settings: Settings
    folder: Path
    smtp: tuple[str, int]
    status: str
    colour: str = "auto"  # as --color says

    @property
    def has_its_ports(self) -> bool:
        """Whether all its ports are free."""
        ports = (self.smtp[1], int(self.status.rpartition(":")[2]))
        return all(free_port(port) == port for port in ports)

    @property
    def has_routes(self) -> bool:
        """Whether a domain has a server of its own."""
        return bool(self.settings.servers)

    @property
    def seen(self) -> Path:
        """The file in which the servers record their actions; see servers.py."""
        return self.folder / "seen.jsonl"

    @property
    def log(self) -> Path:
        return self.folder / "smtp-dup.log"

    @property
    def redis_url(self) -> str:
        return embedded.url(self.folder)


def free_port(wanted: int) -> int:
    """Return this port if it is free, else another free one. Raises StartError."""
    for port in (wanted, 0):
        try:
            with socket.create_server(("127.0.0.1", port)) as probe:
                return int(probe.getsockname()[1])
        except OSError:
            continue
    raise start.StartError("there is no free port on 127.0.0.1")


def command_line(stage: DemoSetup, words: str) -> str:
    """Return a command line for copy and paste that reaches this demo from any folder, whatever settings are there."""
    program = Path(sys.argv[0])
    on_path = shutil.which(program.name)
    if program.name != "smtp-dup":
        name = [sys.executable, "-m", "relay.command"]
    elif on_path and Path(on_path).samefile(program):
        name = [program.name]
    else:
        name = [str(program.absolute())]
    return shlex.join([*name, *words.split(), "--state-dir", str(stage.folder), *_redis_flag(stage)])


def _redis_flag(stage: DemoSetup) -> list[str]:
    """Return the flag that names this Redis, needed where the settings name another one."""
    try:
        elsewhere = load(require_primary=False).redis.url
    except SettingsError:
        elsewhere = "?"
    return ["--redis-url", stage.redis_url] if elsewhere else []
