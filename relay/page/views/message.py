"""One message: where its copies stand, what each server said at each attempt, and its content for an operator."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from redis import Redis
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from relay.cockpit import tracing
from relay.config.model import Settings
from relay.ledger import archive, audit
from relay.ledger.audit import Act
from relay.ledger.copy_state import Attempt
from relay.ledger.queries import UnknownId
from relay.mail.envelope import MalformedRecord
from relay.mail.ids import is_id
from relay.mail.record import BodyElsewhere
from relay.page.access import operator, viewer
from relay.page.views.shell import act, context_of, not_found, page
from relay.trace.life import BAD, GOOD, LATER, MessageLife, Step
from workers.queues import backlog, failed
from workers.queues.backlog import WaitingDetail
from workers.queues.failed import FailedDetail


@dataclass(frozen=True, slots=True)
class MessageCopy:
    """The copy for one backup."""

    destination: str
    state: str  # waits, failed, or what the trace says
    attempts: int
    reply: str
    next_at: float | None = None
    recipients: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class KnownMessage:
    """What is known of a message."""

    id: str
    sender: str
    recipients: Sequence[str]
    size: int
    received_at: float
    client: str
    copies: Sequence[MessageCopy]
    steps: Sequence[Step]
    uncertain_until: float | None = None
    message_id: str = ""
    status: str = ""

    @property
    def has_failed(self) -> bool:
        return any(copy.state == "failed" for copy in self.copies)

    @property
    def waits(self) -> bool:
        return any(copy.state == "waits" for copy in self.copies)


def find(connection: Redis, settings: Settings, message_id: str) -> KnownMessage | None:
    """Return what is known of a message: its life by the trace, and how it stands by the ledger. Raises RedisError."""
    listed, life = _listed(connection, message_id), tracing.life_of(settings, connection, message_id)
    return _told(life, listed) if life else listed


def _told(life: MessageLife, listed: KnownMessage | None) -> KnownMessage:
    """Return a message as the trace tells it; what waits and what failed is as the ledger has it."""
    known = {copy.destination: copy for copy in listed.copies} if listed else {}
    others = [
        MessageCopy(copy.destination, copy.status, copy.attempts, copy.reply)
        for copy in life.copies
        if copy.destination not in known
    ]
    heard = life.received
    return KnownMessage(
        life.id,
        life.sender if heard or not listed else listed.sender,
        life.recipients or (listed.recipients if listed else ()),
        heard.size if heard else listed.size if listed else 0,
        life.at,
        f"{heard.client} ({heard.helo})" if heard and heard.helo else listed.client if listed else "",
        [*known.values(), *others],
        life.timeline(),
        listed.uncertain_until if listed else None,
        life.message_id,
        life.status,
    )


def _listed(connection: Redis, message_id: str) -> KnownMessage | None:
    waiting: list[WaitingDetail] = []
    failing: list[FailedDetail] = []
    with suppress(UnknownId):
        waiting = backlog.show(connection, message_id)
    with suppress(UnknownId):
        failing = failed.show(connection, message_id)
    details: list[WaitingDetail | FailedDetail] = [*waiting, *failing]
    if not details:
        return next((_uncertain(one) for one in backlog.uncertain(connection) if one.id == message_id), None)
    first = details[0]
    copies = [
        *(
            MessageCopy(d.destination, "waits", d.attempts, d.last_reply, d.next_attempt_at, d.recipients)
            for d in waiting
        ),
        *(MessageCopy(d.destination, "failed", d.attempts, d.reply, None, d.recipients) for d in failing),
    ]
    people = list(dict.fromkeys(address for detail in details for address in detail.recipients))
    steps = [
        Step(first.received_at, "relay", "received, and accepted by the primary", None, GOOD),
        *(step for d in details for step in _tried(d.destination, d.history)),
        *(Step(d.failed_at, d.destination, "in the failed list", None, BAD) for d in failing),
    ]
    return KnownMessage(
        message_id,
        first.sender,
        people,
        first.size,
        first.received_at,
        first.client_address,
        copies,
        sorted(steps, key=lambda step: step.at),
    )


def _tried(name: str, history: Sequence[Attempt]) -> Iterator[Step]:
    for at, reply in history:
        yield Step(at, name, reply, None, LATER if reply.startswith("4") else BAD)


def _uncertain(found: backlog.UncertainMessage) -> KnownMessage:
    text = "no reply to the dot: it is not known whether it has the message"
    step = Step(found.received_at, "primary", text, None, LATER)
    return KnownMessage(
        found.id, found.sender, found.recipients, found.size, found.received_at, "", [], [step], found.copied_at
    )


def _id(request: Request) -> str:
    message_id = str(request.path_params["id"])
    if not is_id(message_id):
        raise not_found("That is no id of a message")
    return message_id


@viewer
async def show(request: Request) -> Response:
    """Show what is known of a message."""
    message_id = _id(request)
    context = context_of(request)
    found = await context.ask(find, context.settings, message_id)
    return await page(request, "message/one.html", id=message_id, found=found, status=200 if found else 404)


@operator
async def content(request: Request) -> Response:
    """Give out a failed message, byte for byte; that is in the audit."""
    message_id = _id(request)
    folder = archive.folder(context_of(request).settings.state_dir)

    def export(connection: Redis) -> bytes:
        failed.show(connection, message_id)  # or it is not failed
        found = failed.export(connection, message_id, folder)
        audit.record(connection, Act("failed export", after="1 exported", details={"filter": message_id}))
        return found

    try:
        found = await act(request, export)
    except (BodyElsewhere, MalformedRecord) as error:
        raise not_found(f"It cannot be read here: {error}") from None
    headers = {"Content-Disposition": f'attachment; filename="{message_id}.eml"'}
    return Response(found, media_type="application/octet-stream", headers=headers)


ROUTES = [
    Route("/message/{id}", show, methods=["GET"]),
    Route("/message/{id}/content", content, methods=["POST"]),
]
