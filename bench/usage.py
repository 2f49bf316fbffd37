"""What a process tree uses: CPU time and memory, read from the system. A process that has ended counts nothing."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable
from contextlib import suppress
from typing import Self

import psutil

from support.product import Product

MB = 1e6


def pids(product: Product) -> list[int]:
    """Return every process of a product, the supervisor first."""
    assert product.process is not None
    return [product.process.pid, *(child.pid for child in product.children())]


def kinds(product: Product) -> dict[str, list[int]]:
    """Return its processes by what they are: relay, worker, redis, other."""
    relays = {int(pid) for pid in re.findall(r"relay started pid=(\d+)", product.log)}
    workers = {int(pid) for pid in re.findall(r"worker \S+\.(\d+)\.\d+ serves", product.log)}
    found: dict[str, list[int]] = {"relay": [], "worker": [], "redis": [], "other": []}
    servers = {child.pid for child in product.children(r"(valkey|redis)-server")}
    for pid in pids(product):
        kind = "relay" if pid in relays else "worker" if pid in workers else "redis" if pid in servers else "other"
        found[kind].append(pid)
    return found


def tree(mark: str) -> list[int]:
    """Return a child of ours with this in its command line, and all that descends from it."""
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if any(mark in word for word in child.cmdline()):
                return [child.pid, *descendants(child.pid)]
    return []


def descendants(pid: int) -> list[int]:
    """Return all that descends from a process."""
    with suppress(psutil.Error):
        return [below.pid for below in psutil.Process(pid).children(recursive=True)]
    return []


def cpu_seconds(processes: Iterable[int]) -> float:
    """Return the CPU time that processes have used so far, their ended children's included."""
    total = 0.0
    for pid in processes:
        with suppress(psutil.Error):
            times = psutil.Process(pid).cpu_times()
            total += (
                times.user + times.system + getattr(times, "children_user", 0) + getattr(times, "children_system", 0)
            )
    return total


def resident(processes: Iterable[int]) -> float:
    """Return the sum of resident sets in octets; pages that processes share count for each."""
    total = 0
    for pid in processes:
        with suppress(psutil.Error):
            total += psutil.Process(pid).memory_info().rss
    return float(total)


def proportional(processes: Iterable[int]) -> float:
    """Return what processes really take, in octets: a shared page counts once in all (PSS; else the private ones)."""
    total = 0
    for pid in processes:
        with suppress(psutil.Error):
            full = psutil.Process(pid).memory_full_info()
            total += getattr(full, "pss", 0) or full.uss
    return float(total)


class Peak:
    """Watches processes in a thread while it is open: the peak of their resident and proportional sums, in octets."""

    def __init__(self, processes: Iterable[int], every: float = 0.05) -> None:
        self._processes = list(processes)
        self._every = every
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.resident = 0.0
        self.proportional = 0.0

    def __enter__(self) -> Self:
        self._look()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._end.wait(self._every):
            self._look()

    def _look(self) -> None:
        self.resident = max(self.resident, resident(self._processes))
        self.proportional = max(self.proportional, proportional(self._processes))
