"""A message of a list of copies in full: each of its copies, and what was said at each attempt."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict

from relay.cockpit.formatting import address, moment
from relay.command.output import Output
from workers.queues.backlog import WaitingDetail
from workers.queues.failed import FailedDetail


def show(out: Output, details: Iterable[WaitingDetail | FailedDetail]) -> None:
    """Write the details of a message, a paragraph for each of its copies."""
    for number, detail in enumerate(details):
        if out.as_json:
            history = [{"at": at, "reply": reply} for at, reply in detail.history]
            out.object({**asdict(detail), "history": history})
            continue
        if number:
            out.line("")
        out.pairs(
            (
                ("id", detail.id),
                ("destination", detail.destination),
                ("sender", address(detail.sender)),
                ("recipients", ", ".join(detail.recipients)),
                ("size", f"{detail.size} bytes"),
                ("received", f"{moment(detail.received_at)} from {detail.client_address or 'unknown'}"),
                _when(detail),
                ("attempts", str(detail.attempts)),
                *(("", f"{moment(at)}  {reply}") for at, reply in detail.history),
            )
        )


def _when(detail: WaitingDetail | FailedDetail) -> tuple[str, str]:
    if isinstance(detail, FailedDetail):
        return "failed", moment(detail.failed_at)
    return "next try", moment(detail.next_attempt_at) if detail.next_attempt_at else "now"
