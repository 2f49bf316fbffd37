"""Hosts of a small network: each a network, process and host-name namespace of its own, joined by a bridge.

The test's own namespace is on the bridge too, with the address ``Network.here``. Needs root and iproute2.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import subprocess
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Self

from support.dialogue import Dialogue, Unexpected
from support.product import Child, Product
from support.waiting import wait_until

_PORT, _STATUS_PORT = 2525, 8025


def unavailable() -> str:
    """Say why there can be no such network; "" when there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [name for name in ("ip", "unshare") if shutil.which(name) is None]
    if missing:
        return f"network namespaces need {', '.join(missing)}"
    name = f"sd-{secrets.token_hex(3)}"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode:
        return "network namespaces cannot be made here"
    _ip("netns", "del", name)
    return ""


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"


class Network:
    """A bridge and the hosts on it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._tag = secrets.token_hex(3)
        self._bridge = f"sd{self._tag}"
        self._prefix = f"10.{200 + secrets.randbelow(50)}.{secrets.randbelow(256)}"
        self.here = f"{self._prefix}.254"
        self.apart = f"{self._prefix}.253"  # ours too: a host can be cut off from this one alone
        self.hosts: list[Host] = []

    def __enter__(self) -> Self:
        # By itself a bridge has the lowest address of its ports. With each new host it may change, and who knows the
        # former one goes on sending to it, to nobody, until its entry is old: half a minute.
        own = ":".join(("02", "00", "00", *(self._tag[n : n + 2] for n in (0, 2, 4))))
        _ip("link", "add", self._bridge, "address", own, "type", "bridge")
        for address in (self.here, self.apart):
            _ip("addr", "add", f"{address}/24", "dev", self._bridge)
        _ip("link", "set", self._bridge, "up")
        return self

    def __exit__(self, *_: object) -> None:
        for host in self.hosts:
            host.clean_up()
            subprocess.run(["ip", "netns", "del", host.namespace], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", self._bridge], capture_output=True, check=False)

    def host(self, name: str, command: str, **options: object) -> Host:
        """Return a new host that will run this command of the product."""
        number = len(self.hosts) + 1
        namespace, link = f"sd-{self._tag}-{number}", f"sv{self._tag}{number}"
        address = f"{self._prefix}.{number}"
        _ip("netns", "add", namespace)
        host = Host(self.directory / name, name, namespace, link, address, command, **options)
        self.hosts.append(host)
        _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", namespace)
        _ip("link", "set", link, "master", self._bridge, "up")
        _ip("-n", namespace, "addr", "add", f"{address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _ip("-n", namespace, "link", "set", device, "up")
        return host


class Host(Product):
    """A Product on a host of its own, with its own disk, name, address and process numbers."""

    def __init__(
        self,
        directory: Path,
        name: str,
        namespace: str,
        link: str,
        address: str,
        command: str,
        *,
        primary: str = "",
        backups: Iterable[str] = (),
        settings: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.namespace = namespace
        self.host = address
        self._link = link
        listening = {
            "smtp.listen": f"{address}:{_PORT}",
            "status.listen": f"{address}:{_STATUS_PORT}",
            "smtp.allowed_networks": f"{address.rpartition('.')[0]}.0/24",
        }
        given = {**listening, **(settings or {})}
        super().__init__(directory, primary=primary, backups=backups, command=command, settings=given)
        self.smtp_port, self.status_port = _PORT, _STATUS_PORT

    def die(self) -> None:
        """End as a host does whose power is cut: its link goes down, every process of it is gone at once."""
        _ip("link", "set", self._link, "down")
        assert self.process is not None
        for child in self.children():
            with suppress(ProcessLookupError):  # it has just ended by itself
                os.kill(child.pid, signal.SIGKILL)
        self.clean_up()

    def stop(self, timeout: float = 30) -> int:
        """Send SIGTERM to the supervisor, which has the number 1 there; return its exit status."""
        assert self.process is not None
        for child in self.children():
            if _number_within(child.pid) == "1":
                child.signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} has not drained after {timeout:g} s:\n{self.log[-4000:]}") from None
        finally:
            self.clean_up()

    def cut_off(self, address: str) -> None:
        """Reach this address no more: neither a connection that is open nor a new one gets there."""
        _ip("-n", self.namespace, "route", "add", "blackhole", f"{address}/32")

    def reach(self, address: str) -> None:
        """Reach it again."""
        _ip("-n", self.namespace, "route", "del", "blackhole", f"{address}/32")

    def come_back(self) -> None:
        """Start again with the disk that it had."""
        _ip("link", "set", self._link, "up")
        self.start()

    def child(self, name: str) -> Child:
        """Return the running process of this name; its log has the numbers of its own namespace."""

        def find() -> Child | None:
            started = dict(re.findall(r"(\S+) started as process (\d+)", self.log.replace('"', " ")))
            return next(
                (c for c in self.children() if name in started and _number_within(c.pid) == started[name]), None
            )

        found = wait_until(find, message=lambda: f"no process {name}:\n{self.log[-4000:]}")
        assert found is not None
        return found

    def wait_ready(self, timeout: float = 30) -> None:
        wait_until(self._is_up, timeout, lambda: f"{self.name} is not ready:\n{self.log[-4000:]}", 0.05)

    def _is_up(self) -> bool:
        assert self.process is not None
        status = self.process.poll()
        assert status is None, f"{self.name} ended with {status}:\n{self.log[-4000:]}"
        if self.command == "workers":
            return "serves" in self.log
        try:
            with Dialogue(self.smtp_port, self.host, timeout=5) as client:
                client.quit()
        except (OSError, Unexpected):
            return False
        return True

    def _argv(self, *words: str) -> list[str]:
        inside = ["sh", "-c", 'hostname "$1"; shift; exec "$@"', "sh", self.name, *super()._argv(*words)]
        apart = ["unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        return ["ip", "netns", "exec", self.namespace, *apart, *inside]


def _number_within(pid: int) -> str:
    """Return a process's number in its own namespace, "" when it has just ended."""
    try:
        found = re.search(r"^NSpid:.*\s(\d+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    except OSError:
        return ""
    return found[1] if found else ""
