"""The map of who has moved as other programs read it: Postfix's transport(5), Dovecot's passwd-file, nginx's map, CSV.

What such a file cannot hold stands there as a comment, never as something else.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping

from relay.cockpit.formatting import moment
from relay.mail.destination import Destination
from relay.mail.text import printable
from relay.topology.moved import MovedEntry

_PLAIN = re.compile(r"[^\s#:\"'\\;{}$]+")  # of an address, in all of these formats
_BLANK_OR_MARK = re.compile(r"[\s\"\\]|^#")

Entries = Iterable[tuple[str, MovedEntry]]


def lines(form: str, entries: Entries, servers: Mapping[str, Destination], hosts: Mapping[str, str]) -> Iterator[str]:
    """Yield the lines of an export; ``hosts`` names the host that stands for a server, where it is another."""
    if form == "csv":
        yield from _csv(entries)
        return
    head, line_of = _FORMS[form]
    yield head
    for key, entry in entries:
        if server := servers.get(entry.server):
            line = line_of(key, hosts.get(server.name) or server.host, server)
        else:
            line = _left_out(key, f"{entry.server} is in no settings here")
        yield line


def _postfix(key: str, host: str, server: Destination) -> str:
    name = key.removeprefix("@")
    if _BLANK_OR_MARK.search(name):
        return _left_out(key, "no key of such a file")
    transport = "lmtp:inet:" if server.scheme == "lmtp" else "smtp:"
    return f"{name}\t{transport}[{host}]:{server.port}"


def _dovecot(key: str, host: str, _server: Destination) -> str:
    name = key.removeprefix("@")
    if not _PLAIN.fullmatch(name) or name.startswith("."):
        return _left_out(key, "no user of such a file")
    return f"{name}:::::::nopassword=y proxy=y host={host}"


def _nginx(key: str, host: str, _server: Destination) -> str:
    if not printable(key).isprintable() or "\n" in key:
        return _left_out(key, "no text of such a file")
    return f"{_nginx_text(_nginx_key(key))} {_nginx_text(host)};"


def _nginx_key(key: str) -> str:
    if not key.startswith("@"):
        return key if key[:1] not in {"~", "\\"} else f"\\{key}"
    domain = key[1:]
    if domain.startswith("."):
        return rf"~*@.+{re.escape(domain)}$"
    return rf"~*@{re.escape(domain)}$"


def _nginx_text(text: str) -> str:
    quoted = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{quoted}"'


def _csv(entries: Entries) -> Iterator[str]:
    yield "address,server,at,by,note"
    for key, entry in entries:
        text = io.StringIO()
        csv.writer(text, lineterminator="").writerow([key, entry.server, moment(entry.at), entry.by, entry.note])
        yield text.getvalue()


def _left_out(key: str, why: str) -> str:
    return f"# left out: {printable(key)}: {printable(why)}"


_FORMS: Mapping[str, tuple[str, Callable[[str, str, Destination], str]]] = {
    "postfix": ("# transport(5): postmap it, or name it as texthash:/path in transport_maps.", _postfix),
    "dovecot": ("# passdb passwd-file of a proxy; a domain has a line of its own: see docs/migration.md", _dovecot),
    "nginx": ("# include it in a map {}: docs/migration.md", _nginx),
}
