"""Failed messages that are ticked, or all that meet the filter, byte for byte as one tar file."""

from __future__ import annotations

import tarfile
from collections.abc import AsyncIterator, Iterator, Sequence

from redis import Redis
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from relay.cockpit.conditions import BadCondition
from relay.ledger import archive, audit
from relay.ledger.audit import Act
from relay.ledger.queries import Unknown
from relay.mail.envelope import MalformedRecord
from relay.mail.record import BodyElsewhere
from relay.page.access import operator
from relay.page.views import copies
from relay.page.views.shell import act, context_of, not_found
from workers.queues import failed, selection
from workers.queues.selection import FAILED, Filter

_MOST = 10_000  # messages of one file
_BLOCK = tarfile.BLOCKSIZE
_UNREAD = "unreadable.txt"


@operator
async def export(request: Request) -> Response:
    """Give out messages; that is in the audit."""
    try:
        filters, words = copies.chosen_by(request)
    except BadCondition as error:
        raise not_found(f"{error.name}: {error}") from None
    if not filters:
        return await copies.show(request, "failed", {"ticks": "Tick the messages that you mean."})

    def choose(connection: Redis) -> list[str]:
        found = list(_ids(connection, filters))[: _MOST + 1]
        audit.record(connection, Act("failed export", after=f"{len(found)} exported", details={"filter": words}))
        return found

    ids = await act(request, choose)
    if len(ids) > _MOST:
        text = f"More than {_MOST:,} messages: narrow the filter down, or use `smtp-dup failed export`."
        return await copies.show(request, "failed", {"copy": text})
    headers = {"Content-Disposition": 'attachment; filename="failed.tar"'}
    return StreamingResponse(_tar(request, ids), media_type="application/x-tar", headers=headers)


def _ids(connection: Redis, filters: Sequence[Filter]) -> Iterator[str]:
    seen: set[str] = set()
    for chosen in filters:
        for found in selection.select(connection, FAILED, chosen):
            for copy in found.found:
                if copy.id not in seen:
                    seen.add(copy.id)
                    yield copy.id
                if len(seen) > _MOST:
                    return


async def _tar(request: Request, ids: Sequence[str]) -> AsyncIterator[bytes]:
    """Yield the file, message by message; what cannot be read is told in a file of its own at the end."""
    context = context_of(request)
    folder = archive.folder(context.settings.state_dir)
    unread: list[str] = []
    for message_id in ids:
        if context.is_stopping:
            raise ConnectionAbortedError("this process stops")
        try:
            content = await context.ask(failed.export, message_id, folder)
        except Unknown:
            continue  # it has left the list meanwhile
        except (BodyElsewhere, MalformedRecord) as error:
            unread.append(f"{message_id}: {error}\n")
            continue
        for part in _file(f"{message_id}.eml", content):
            yield part
    if unread:
        for part in _file(_UNREAD, "".join(unread).encode()):
            yield part
    yield bytes(2 * _BLOCK)


def _file(name: str, content: bytes) -> Iterator[bytes]:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(content), 0o600
    yield entry.tobuf(tarfile.USTAR_FORMAT)
    yield content
    yield bytes(-len(content) % _BLOCK)


ROUTES = [Route("/failed/export", export, methods=["POST"])]
