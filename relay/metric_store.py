"""Metrics of several processes in shared memory; not in files, since a full disk would kill a process with SIGBUS.

An Arena is made before the first fork and has a region for each process to come. A process writes only its own region,
and the status server reads all. The successor of a process continues in its region, so that counts are kept and regions
do not accumulate. Several processes of one name may run while those of earlier settings drain: each has a seat of its
own. A damaged region is skipped and counted; a full or missing one loses its metrics. Changing a value never raises.
"""

from __future__ import annotations

import functools
import json
import mmap
import os
import secrets
import struct
import threading
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from relay.event_ring import EventRing

_REGIONS = 1024
_SIZE = 384 << 10  # address space: memory only where it is written. A hundred servers have their times in it
_HEAD = 8  # octets: the number of used octets, and whether something had no room
_FULL = 4  # where in the head that stands
_length = struct.Struct("=I")

# ((sample name, labels), value); the value of a bucket is not cumulative.
Reading: TypeAlias = tuple[tuple[str, tuple[tuple[str, str], ...]], float]


class Arena(Collector):
    """The regions of all processes, and the collector that sums them."""

    def __init__(self, regions: int = _REGIONS, size: int = _SIZE) -> None:
        """Make empty regions, which use memory only once written. Raises OSError without memory."""
        self._size = size
        self._memory = memoryview(mmap.mmap(-1, regions * size))
        self._numbers: dict[tuple[str, int], int] = {}
        self._count = memoryview(mmap.mmap(-1, 8)).cast("q")  # number of reserved regions, shared with children
        self._most = regions
        self.events = EventRing(regions)
        self.identity = secrets.token_hex(8)  # readings can be compared only within one Arena

    def reserve(self, name: str, seat: int = 0) -> None:
        """Reserve a region for the process of this name and seat, before it is forked."""
        if (name, seat) not in self._numbers and len(self._numbers) < self._most:
            self._numbers[name, seat] = len(self._numbers)
            self._count[0] = len(self._numbers)

    def take(self, name: str, seat: int = 0) -> None:
        """Use this region for the metrics of this process, continuing the counts of its predecessor."""
        number = self._numbers.get((name, seat))
        if number is not None:
            _bind(_Region(self._of(number)))
        self.events.take(number)

    def readings(self) -> Iterator[tuple[int, list[Reading]]]:
        """Yield the number and the values of each region, without the damaged ones."""
        for number in range(self._count[0]):
            try:
                entries = list(_entries(self._of(number)))
            except ValueError:
                continue
            if entries:
                yield number, [((sample, labels), value) for (_, _, sample, labels, _), value in entries]

    def new_events(self, seen: dict[int, int]) -> list[tuple[float, str, dict[str, Any]]]:
        """Return the events of all processes since the last call with this ``seen``, which it brings up to date."""
        return self.events.since(seen, self._count[0])

    def collect(self) -> Iterator[Metric]:
        """Yield the sums over all regions; for a gauge, the largest value."""
        metrics: dict[str, Metric] = {}
        unreadable = full = 0
        for number in range(self._count[0]):
            try:
                entries = list(_entries(self._of(number)))
            except ValueError:
                unreadable += 1
                continue
            full += _length.unpack_from(self._of(number), _FULL)[0] == 1
            for key, value in entries:
                kind, metric, name, labels, text = key
                if metric not in metrics:
                    metrics[metric] = Metric(metric, text, kind)
                    metrics[metric]._multiprocess_mode = "max"  # type: ignore[attr-defined]  # noqa: SLF001 - of a gauge
                metrics[metric].documentation = metrics[metric].documentation or text
                metrics[metric].add_sample(name, labels, value)  # type: ignore[arg-type]  # as it does itself
        yield from MultiProcessCollector._accumulate_metrics(metrics, True)  # noqa: SLF001 - sums buckets
        text = "Processes whose metrics are damaged and left out"
        yield GaugeMetricFamily("smtpdup_metrics_unreadable", text, value=unreadable)
        text = "Processes without room for all of their metrics"
        yield GaugeMetricFamily("smtpdup_metrics_full", text, value=full)

    def _of(self, number: int) -> memoryview:
        return self._memory[number * self._size : (number + 1) * self._size]


def _entries(memory: memoryview) -> Iterator[tuple[tuple[str, str, str, tuple[tuple[str, str], ...], str], float]]:
    """Yield the keys and values of a region. Raises ValueError if it is damaged."""
    for key, at in _positions(memory):
        yield _read_key(key), memory[at : at + 8].cast("d")[0]


@functools.lru_cache(maxsize=16384)
def _read_key(key: bytes) -> tuple[str, str, str, tuple[tuple[str, str], ...], str]:
    """Return kind, metric, sample, labels and help. Raises ValueError if the key is damaged."""
    try:
        kind, metric, name, labels, text = json.loads(key)
        return str(kind), str(metric), str(name), tuple(sorted(labels.items())), str(text)
    except (TypeError, AttributeError) as error:
        raise ValueError("no key of ours") from error


def _positions(memory: memoryview) -> Iterator[tuple[bytes, int]]:
    """Yield the keys of a region and the offsets of their values. Raises ValueError if it is damaged."""
    (used,) = _length.unpack_from(memory)
    if used > len(memory) or used % 8:
        raise ValueError("more is used than there is")
    at = _HEAD
    while at < used:
        (size,) = _length.unpack_from(memory, at)
        value = at + _padded(size)
        if not size or value + 8 > used:
            raise ValueError("an entry ends behind the last one")
        yield bytes(memory[at + 4 : at + 4 + size]), value
        at = value + 8


def _padded(size: int) -> int:
    return (4 + size + 7) & ~7


class _Region:
    """The region of this process."""

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory
        try:
            self._places = dict(_positions(memory))
        except ValueError:  # the predecessor's region is damaged
            self._places = {}
            _length.pack_into(memory, 0, 0)
        (used,) = _length.unpack_from(memory)
        self._used = max(_HEAD, used)

    def place(self, key: bytes) -> memoryview[float] | None:
        """Return the memory of a value, created if missing; None if the region is full."""
        at = self._places.get(key)
        if at is None:
            at = self._used + _padded(len(key))
            if at + 8 > len(self._memory):
                _length.pack_into(self._memory, _FULL, 1)
                return None
            self._memory[self._used + 4 : self._used + 4 + len(key)] = key
            _length.pack_into(self._memory, self._used, len(key))
            self._memory[at : at + 8] = bytes(8)
            self._used = at + 8
            _length.pack_into(self._memory, 0, self._used)  # last, so that a reader sees a complete entry
            self._places[key] = at
        return self._memory[at : at + 8].cast("d")


_region: _Region | None = None
_values: list[Value] = []
_lock = threading.Lock()


class Value:
    """The value class that prometheus-client uses for each number."""

    _multiprocess = True

    def __init__(
        self,
        typ: str,
        metric_name: str,
        name: str,
        labelnames: Sequence[str],
        labelvalues: Sequence[str],
        help_text: str,
        **_: Any,
    ) -> None:
        labels = dict(zip(labelnames, labelvalues, strict=True))
        text = "" if name.endswith("_bucket") else help_text  # which is there once, in that of the sum
        self._key = json.dumps([typ, metric_name, name, labels, text], sort_keys=True).encode()
        self._value = 0.0
        self._place: memoryview[float] | None = None
        with _lock:
            _values.append(self)
            self._settle()

    def _settle(self) -> None:
        self._place = _region.place(self._key) if _region is not None else None
        self._value = self._place[0] if self._place is not None else 0.0

    def inc(self, amount: float) -> None:
        # Without the lock, which takes three times as long: CPython changes threads at calls and jumps only.
        self._value = value = self._value + amount
        if self._place is not None:
            self._place[0] = value

    def set(self, value: float, timestamp: float | None = None) -> None:
        with _lock:
            self._value = value
            if self._place is not None:
                self._place[0] = value

    def get(self) -> float:
        return self._value

    def set_exemplar(self, exemplar: Any) -> None:
        """Ignore it."""

    def get_exemplar(self) -> None:
        """Return None."""


def _bind(region: _Region | None) -> None:
    global _region  # noqa: PLW0603 - there is one in a process
    with _lock:
        _region = region
        for value in _values:
            value._settle()  # noqa: SLF001 - of this module


def _forked() -> None:
    global _lock  # noqa: PLW0603 - a thread of the parent may hold the one before
    _lock = threading.Lock()
    _bind(None)  # the region belongs to the parent


os.register_at_fork(after_in_child=_forked)
