"""A recipient of a message, as RCPT named it."""

from __future__ import annotations

from typing import NamedTuple


class Recipient(NamedTuple):
    """One accepted RCPT: the address without angle brackets, and its ESMTP parameters as they came."""

    address: str
    parameters: tuple[str, ...] = ()

    @property
    def domain(self) -> str:
        return self.address.rpartition("@")[2].lower()
