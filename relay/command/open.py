"""`open`: a link to the page that lets in whoever may run commands here, once and within a minute."""

from __future__ import annotations

import socket

from relay.command.connection import ledger_of
from relay.command.exit_status import WELL, Trouble
from relay.command.output import Output
from relay.config.loader import Settings
from relay.ledger import audit, page_access
from relay.ledger.audit import Act
from relay.page import hosts

_LOOK_SECONDS = 1.0


def link(settings: Settings, out: Output, role: str) -> int:
    """Print a new link. Says no where there is no page."""
    status = settings.status
    if not status.listen:
        raise Trouble("there is no page: status.listen is off")
    if hosts.is_off(status):
        raise Trouble(
            f"the page is off: others can reach status.listen ({status.listen}), and status.users_file is not set; "
            "a file without users is enough for these links"
        )
    with ledger_of(settings) as connection:
        who = audit.operator()
        token = page_access.make_link(connection, who, role)
        audit.record(connection, Act("open", after=role))
    url = f"{hosts.address(status)}/open?token={token}"
    if out.as_json:
        out.object({"url": url, "role": role, "seconds": page_access.LINK_SECONDS, "listens": _is_there(settings)})
        return WELL
    out.line(url)
    out.line(f"Good once, within a minute, for one browser as {role}.")
    if not _is_there(settings):
        out.line(f"Nothing listens on {status.listen} here: is smtp-dup running?")
    return WELL


def _is_there(settings: Settings) -> bool:
    host, port = settings.status.address or ("", 0)
    try:
        with socket.create_connection((host or "localhost", port), timeout=_LOOK_SECONDS):
            return True
    except OSError:
        return False
