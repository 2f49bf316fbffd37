"""A recipient of a message, as given by RCPT."""

from __future__ import annotations

from typing import NamedTuple


class Recipient(NamedTuple):
    """One RCPT: the address without angle brackets, and the ESMTP parameters unchanged."""

    address: str
    parameters: tuple[str, ...] = ()

    @property
    def domain(self) -> str:
        return self.address.rpartition("@")[2].lower()
