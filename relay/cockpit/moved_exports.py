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
    yield from _FORMS[form](entries, servers, hosts)


def _postfix(entries: Entries, servers: Mapping[str, Destination], hosts: Mapping[str, str]) -> Iterator[str]:
    yield "# transport(5): postmap it, or name it as texthash:/path in transport_maps."
    for key, entry in entries:
        name = key.removeprefix("@")
        server = servers.get(entry.server)
        if server is None:
            yield _left_out(key, f"{entry.server} is in no settings here")
        elif _BLANK_OR_MARK.search(name):
            yield _left_out(key, "no key of such a file")
        else:
            host = hosts.get(server.name) or server.host
            transport = "lmtp:inet:" if server.scheme == "lmtp" else "smtp:"
            yield f"{name}\t{transport}[{host}]:{server.port}"


def _dovecot(entries: Entries, servers: Mapping[str, Destination], hosts: Mapping[str, str]) -> Iterator[str]:
    yield "# passdb passwd-file of a proxy; a domain has a line of its own: see docs/migration.md"
    for key, entry in entries:
        name, host = key.removeprefix("@"), _host(entry, servers, hosts)
        if not host:
            yield _left_out(key, f"{entry.server} is in no settings here")
        elif not _PLAIN.fullmatch(name) or name.startswith("."):
            yield _left_out(key, "no user of such a file")
        else:
            yield f"{name}:::::::nopassword=y proxy=y host={host}"


def _nginx(entries: Entries, servers: Mapping[str, Destination], hosts: Mapping[str, str]) -> Iterator[str]:
    yield "# include it in a map {}: docs/migration.md"
    for key, entry in entries:
        host = _host(entry, servers, hosts)
        if not host:
            yield _left_out(key, f"{entry.server} is in no settings here")
        elif not printable(key).isprintable() or "\n" in key:
            yield _left_out(key, "no text of such a file")
        else:
            yield f"{_nginx_text(_nginx_key(key))} {_nginx_text(host)};"


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


def _csv(entries: Entries, _servers: Mapping[str, Destination], _hosts: Mapping[str, str]) -> Iterator[str]:
    yield "address,server,at,by,note"
    for key, entry in entries:
        text = io.StringIO()
        csv.writer(text, lineterminator="").writerow([key, entry.server, moment(entry.at), entry.by, entry.note])
        yield text.getvalue()


def _host(entry: MovedEntry, servers: Mapping[str, Destination], hosts: Mapping[str, str]) -> str:
    server = servers.get(entry.server)
    return hosts.get(entry.server) or (server.host if server else "")


def _left_out(key: str, why: str) -> str:
    return f"# left out: {printable(key)}: {printable(why)}"


_FORMS: Mapping[str, Callable[[Entries, Mapping[str, Destination], Mapping[str, str]], Iterator[str]]] = {
    "postfix": _postfix,
    "dovecot": _dovecot,
    "nginx": _nginx,
    "csv": _csv,
}
