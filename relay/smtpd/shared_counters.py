"""What all relay processes have in hand (clients, octets, password checks), so that limits count for them together.

Shared memory, made before the processes are forked: each writes only its own part and reads all. A process that dies
leaves its numbers; the one that takes its place starts with zeros. Beside it processes of an earlier generation may
still finish what they have in hand: each has a seat of its own, and all count. Clients by address are counted in a
table whose slots some share by chance: seldom, and then a limit is reached too early.
"""

from __future__ import annotations

import hashlib
import mmap
import random
from dataclasses import dataclass, replace

from relay.smtpd.password_guesses import Guesses

_FIELDS = 3  # clients, octets, passwords that wait to be checked
_SLOTS = 1 << 14  # for addresses
SEATS = 8  # processes at one place at the same time: the one that takes clients, and earlier ones that drain


class SharedCounters:
    """The numbers of all processes."""

    def __init__(self, processes: int) -> None:
        self._processes = max(1, processes)
        seats = self._processes * SEATS  # what nobody sits on takes no memory
        self._numbers = memoryview(mmap.mmap(-1, seats * _FIELDS * 8)).cast("q")
        self._addresses = memoryview(mmap.mmap(-1, seats * _SLOTS * 4)).cast("i")
        self._rows = memoryview(mmap.mmap(-1, 8)).cast("q")
        self._guesses = Guesses()
        self._salt = random.SystemRandom().getrandbits(64)  # nobody can choose whom to share a slot with

    def of_process(self, index: int) -> ProcessCounters:
        """Return the counters of the process at one place."""
        return ProcessCounters(
            self._numbers, self._addresses, self._salt, index, self._guesses, self._processes, self._rows
        )


@dataclass(slots=True)
class ProcessCounters:
    """One process's own numbers, and the sums of all."""

    _numbers: memoryview
    _addresses: memoryview
    _salt: int
    _index: int
    guesses: Guesses
    _processes: int
    _rows: memoryview  # so many seats have ever been taken at one place; no more is summed up

    def at_seat(self, seat: int) -> ProcessCounters:
        """Return those of another seat at the same place."""
        return replace(self, _index=self._index % self._processes + seat * self._processes)

    def take(self) -> None:
        """Start with zeros, whatever a predecessor left."""
        self._rows[0] = max(self._rows[0], self._index // self._processes + 1)
        self.clear()

    def clear(self) -> None:
        """Forget what a process had in hand that has ended."""
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
        return sum(self._numbers[1 : self._end * _FIELDS : _FIELDS])

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
        """Return how many connections are counted for an address."""
        return sum(self._addresses[self._slot(address) : self._end * _SLOTS : _SLOTS])

    def count_address(self, address: str, change: int) -> None:
        self._addresses[self._index * _SLOTS + self._slot(address)] += change

    def _slot(self, address: str) -> int:
        # Not hash(): it would differ in a process that was not forked from the one that made the table.
        return (
            int.from_bytes(hashlib.blake2b(address.encode(), digest_size=8, salt=self._salt.to_bytes(8)).digest())
            % _SLOTS
        )
