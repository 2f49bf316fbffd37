"""What `check` and /readyz say of routes: their servers, and the tables that they go by."""

from __future__ import annotations

import time
from collections.abc import Iterator

from relay.config.model import Settings
from relay.config.routes import Route
from relay.mail.text import count, printable
from relay.monitoring.probe_result import ProbeResult
from relay.routing import loading, moved_copy, table_store
from relay.routing.table_file import BadTable

SUBJECT = "table "
MOVED = "copy of who has moved"
DEFERRED = (
    "recipients of one message that need another primary than its first one get 452 and come by themselves: with "
    "Postfix in front after minutes, unless its transport has recipient_limit = 1 or splits by port (docs/routes.md)"
)
FORKED = (
    "a message for recipients of several primaries goes to each at once; where one refuses it at its end and another "
    "takes it, the client hears 250: a 4xx there becomes a copy, a 5xx is in the failed list, and nobody bounces"
)


def unusable_map(settings: Settings) -> Iterator[ProbeResult]:
    """Say that this host's copy of who has moved cannot be used; nothing where it can, or there is none."""
    try:
        moved_copy.load(settings.state_dir)
    except OSError as error:
        text = f"this host's copy of who has moved cannot be used: {printable(str(error))}"
        text += (
            "; the next move, or a start that reaches Redis, writes it anew: do either before Redis is stopped, since "
            "after a start without it their former servers answer"
        )
        yield ProbeResult(MOVED, False, text)


def about_routes(settings: Settings) -> Iterator[ProbeResult]:
    """Say which tables can be read and how many keys they have, and what it means to have several primaries."""
    for source in loading.sources(settings):
        try:
            table = table_store.read(source, settings.named, fold=settings.routes.fold_local)
        except BadTable as error:
            yield ProbeResult(f"{SUBJECT}{source}", False, "; ".join(error.faults))
            continue
        changed = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(table.note.changed))
        to = f", for {', '.join(table.note.servers)}" if table.note.servers else ""
        yield ProbeResult(f"{SUBJECT}{source}", True, f"{count(table.note.keys, 'key')}{to}, of {changed}")
    for split, text in (("defer", DEFERRED), ("fork", FORKED)):
        if names := [r.name for r in settings.route_table if _decides_by_recipient(r) and r.split == split]:
            yield ProbeResult("routes", True, f"{', '.join(names)}: {text}")


def _decides_by_recipient(route: Route) -> bool:
    return route.match.recipients.are_given or (bool(route.weights) and route.stick == "recipient")


def refused_tables(settings: Settings) -> Iterator[ProbeResult]:
    """Name the tables whose files cannot be used as they are: what was read before holds."""
    for source in loading.sources(settings):
        held = table_store.standing(settings.state_dir, source)
        if held is not None and held.fault:
            yield ProbeResult(f"{SUBJECT}{source}", False, f"refused, what was read before holds: {held.fault}")
