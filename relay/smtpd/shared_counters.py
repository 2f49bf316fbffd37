"""Counters that all relay processes share (clients, octets, password checks), so that limits apply to them together.

They are shared memory, made before the processes are forked: each process writes only its own part and reads all. A
process that dies leaves its numbers; its replacement starts with zeros. Processes of an earlier generation may still
drain beside it: each has a seat of its own, and all seats count. Clients by network prefix are counted in a hash table
of fixed size: rarely, two prefixes share a slot and reach the limit early. Nothing here raises.
"""

from __future__ import annotations

import hashlib
import mmap
import random
from dataclasses import dataclass, replace

from relay.smtpd.password_guesses import Guesses

_FIELDS = 3  # clients, octets, passwords that wait to be checked
_SLOTS = 1 << 14  # for network prefixes
SEATS = 8  # processes with the same index at the same time: the one that takes clients, and earlier ones that drain


@dataclass(slots=True)
class ProcessCounters:
    """The counters of one process, and the sums over all."""

    _numbers: memoryview
    _addresses: memoryview
    _salt: int
    _index: int
    guesses: Guesses
    _processes: int
    _rows: memoryview  # one number: the highest seat taken so far; seats beyond it are not summed

    @classmethod
    def shared_by(cls, processes: int) -> list[ProcessCounters]:
        """Return the counters of so many processes, each at its first seat."""
        seats = processes * SEATS  # a seat that was never taken uses no memory
        numbers = memoryview(mmap.mmap(-1, seats * _FIELDS * 8)).cast("q")
        addresses = memoryview(mmap.mmap(-1, seats * _SLOTS * 4)).cast("i")
        rows, guesses = memoryview(mmap.mmap(-1, 8)).cast("q"), Guesses()
        salt = random.SystemRandom().getrandbits(64)  # so that no client can aim at the slot of another
        return [cls(numbers, addresses, salt, index, guesses, processes, rows) for index in range(processes)]

    def at_seat(self, seat: int) -> ProcessCounters:
        """Return the counters of another seat with the same index."""
        return replace(self, _index=self._index % self._processes + seat * self._processes)

    def take(self) -> None:
        """Take this seat, and set its counters to zero."""
        self._rows[0] = max(self._rows[0], self._index // self._processes + 1)
        self.clear()

    def clear(self) -> None:
        """Set the counters of this seat to zero, after its process has ended."""
        at = self._index * _FIELDS
        self._numbers[at : at + _FIELDS] = memoryview(bytes(_FIELDS * 8)).cast("q")
        at = self._index * _SLOTS
        self._addresses[at : at + _SLOTS] = memoryview(bytes(_SLOTS * 4)).cast("i")

    @property
    def _end(self) -> int:
        return max(1, int(self._rows[0])) * self._processes

    @property
    def clients(self) -> int:
        return sum(self._numbers[0 : self._end * _FIELDS : _FIELDS])

    @property
    def own_clients(self) -> int:
        return int(self._numbers[self._index * _FIELDS])

    @property
    def octets(self) -> int:
        # Asked for four times a message: ``_end`` written out.
        return sum(self._numbers[1 : (self._rows[0] or 1) * self._processes * _FIELDS : _FIELDS])

    def add_client(self, change: int) -> None:
        self._numbers[self._index * _FIELDS] += change

    def add_octets(self, change: int) -> None:
        self._numbers[self._index * _FIELDS + 1] += change

    @property
    def waiting_passwords(self) -> int:
        return sum(self._numbers[2 : self._end * _FIELDS : _FIELDS])

    def add_waiting_password(self, change: int) -> None:
        self._numbers[self._index * _FIELDS + 2] += change

    def connections_of(self, address: str) -> int:
        """Return the number of connections from a network prefix, over all processes."""
        return sum(self._addresses[self._slot(address) : self._end * _SLOTS : _SLOTS])

    def count_address(self, address: str, change: int) -> None:
        self._addresses[self._index * _SLOTS + self._slot(address)] += change

    def _slot(self, address: str) -> int:
        # Not hash(): its value differs between processes that were not forked from the same parent.
        return (
            int.from_bytes(hashlib.blake2b(address.encode(), digest_size=8, salt=self._salt.to_bytes(8)).digest())
            % _SLOTS
        )
