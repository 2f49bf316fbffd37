"""What all relay processes have in hand (clients, octets, password checks), so that limits count for them together.

Shared memory, made before the processes are forked: each writes only its own part and reads all. A process that dies
leaves its numbers; the one that takes its place starts with zeros. Clients by address are counted in a table whose
slots some share by chance: seldom, and then a limit is reached too early.
"""

from __future__ import annotations

import hashlib
import mmap
import random
from dataclasses import dataclass

from relay.smtpd.password_guesses import Guesses

_FIELDS = 3  # clients, octets, passwords that wait to be checked
_SLOTS = 1 << 14  # for addresses


class SharedCounters:
    """The numbers of all processes."""

    def __init__(self, processes: int) -> None:
        self._numbers = memoryview(mmap.mmap(-1, max(1, processes) * _FIELDS * 8)).cast("q")
        self._addresses = memoryview(mmap.mmap(-1, max(1, processes) * _SLOTS * 4)).cast("i")
        self._guesses = Guesses()
        self._salt = random.SystemRandom().getrandbits(64)  # nobody can choose whom to share a slot with

    def of_process(self, index: int) -> ProcessCounters:
        """Return the counters of one process."""
        return ProcessCounters(self._numbers, self._addresses, self._salt, index, self._guesses)


@dataclass(slots=True)
class ProcessCounters:
    """One process's own numbers, and the sums of all."""

    _numbers: memoryview
    _addresses: memoryview
    _salt: int
    _index: int
    guesses: Guesses

    def take(self) -> None:
        """Start with zeros, whatever a predecessor left."""
        at = self._index * _FIELDS
        self._numbers[at : at + _FIELDS] = memoryview(bytes(_FIELDS * 8)).cast("q")
        at = self._index * _SLOTS
        self._addresses[at : at + _SLOTS] = memoryview(bytes(_SLOTS * 4)).cast("i")

    @property
    def clients(self) -> int:
        return sum(self._numbers[0::_FIELDS])

    @property
    def own_clients(self) -> int:
        return int(self._numbers[self._index * _FIELDS])

    @property
    def octets(self) -> int:
        return sum(self._numbers[1::_FIELDS])

    def add_client(self, change: int) -> None:
        self._numbers[self._index * _FIELDS] += change

    def add_octets(self, change: int) -> None:
        self._numbers[self._index * _FIELDS + 1] += change

    @property
    def waiting_passwords(self) -> int:
        return sum(self._numbers[2::_FIELDS])

    def add_waiting_password(self, change: int) -> None:
        self._numbers[self._index * _FIELDS + 2] += change

    def connections_of(self, address: str) -> int:
        """Return how many connections are counted for an address."""
        return sum(self._addresses[self._slot(address) :: _SLOTS])

    def count_address(self, address: str, change: int) -> None:
        self._addresses[self._index * _SLOTS + self._slot(address)] += change

    def _slot(self, address: str) -> int:
        # Not hash(): it would differ in a process that was not forked from the one that made the table.
        return (
            int.from_bytes(hashlib.blake2b(address.encode(), digest_size=8, salt=self._salt.to_bytes(8)).digest())
            % _SLOTS
        )
