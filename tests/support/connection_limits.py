"""What servers say when a connection has carried enough, in words that might as well be about a message."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from support.reactions import Close, Moment

REFUSALS = (
    "452 4.5.3 Command not allowed: Too many messages sent",
    "451 4.4.5 Maximum number of messages per session exceeded",
    "503 5.5.1 Nested MAIL command",
    "550 5.7.1 Not again",
    "554 no more on this connection",
    "421 4.7.0 too many errors",
    Close(),
)


def beyond(count: int, refusal: Any) -> Callable[[Moment], Any]:
    """Refuse when a connection has carried so many transactions."""
    return lambda moment: refusal if sum(t.accepted for t in moment.connection.transactions) >= count else None
