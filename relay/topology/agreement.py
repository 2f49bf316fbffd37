"""Whether the settings of several hosts mean the same by a name: each relay process says with a beat what its own do.

A decision is about names of servers and routes; what they stand for, each host's settings say. Where hosts differ, a
mailbox has another server for mail that comes in elsewhere, and nobody would hear of it. Said are digests, not what
stands there: a short one for each name. An address may well differ from host to host, so it is told, and prevents
nothing.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping

from relay.config.model import Settings
from relay.config.routes import Entries, Route
from relay.topology.decisions import View
from relay.topology.heartbeats import Heartbeat

ORDER = "order of routes"
_DIGITS = 6


def fingerprints(settings: Settings) -> dict[str, str]:
    """Return a digest of what each server and route of these settings stands for, by kind and name."""
    found = {f"server {s.name}": _digest([s.scheme, s.address, sorted(s.domains)]) for s in settings.named}
    found |= {f"route {route.name}": _digest(_of_route(route)) for route in settings.route_table}
    found[ORDER] = _digest([route.name for route in settings.route_table])
    return found


def differences(seen: View) -> Iterator[str]:
    """Yield where the settings of a host, by its newest process, are otherwise than those of most hosts."""
    hosts: dict[str, Heartbeat] = {}
    for beat in seen.living:
        place = beat.process.rpartition(" ")[0]
        if beat.settings is not None and (place not in hosts or beat.generation > hosts[place].generation):
            hosts[place] = beat
    beats = list(hosts.values())
    if len(beats) > 1:
        yield from _beside_most(beats)
    if seen.topology is None and len({beat.primary for beat in beats}) > 1:
        yield "the primary by default is " + ", ".join(f"{beat.primary} at {beat.label}" for beat in beats)


def behind_with_moves(seen: View) -> Iterator[str]:
    """Yield which living process does not go by who has moved as Redis has it, and what makes no sense there."""
    for beat in seen.living:
        if beat.moved_trouble:
            yield f"{beat.label}: {beat.moved_trouble}"
    for beat in seen.living:
        if not beat.moved_trouble and not seen.goes_by_moves(beat):
            yield f"{beat.label} has not followed: it goes by generation {beat.moved or 0}"
    if seen.nonsense_of_moves:
        yield f"what Redis holds as the state of who has moved makes no sense: {seen.nonsense_of_moves}"


def _beside_most(beats: list[Heartbeat]) -> Iterator[str]:
    said = [(beat.label, beat.settings or {}) for beat in beats]
    names = sorted({name for _, settings in said for name in settings})
    usual = {name: Counter(settings.get(name) for _, settings in said).most_common(1)[0][0] for name in names}
    for label, settings in said:
        different = [name for name in names if settings.get(name) != usual[name]]
        if ORDER in different and any(
            n not in settings or usual[n] is None for n in different if n.startswith("route ")
        ):
            different.remove(ORDER)  # that follows from it
        if others := [_in_words(name, settings, usual) for name in different]:
            yield f"the settings of {label} have {', '.join(others)}, beside those of other hosts"


def _in_words(name: str, settings: Mapping[str, str], usual: Mapping[str, str | None]) -> str:
    if name not in settings:
        return f"no {name}"
    return f"a further {name}" if usual[name] is None else f"another {name}"


def _of_route(route: Route) -> object:
    """Return what it is for and who answers; where its tables and the listening addresses are is the host's own."""
    match = route.match
    return [
        _entries(match.recipients),
        _entries(match.senders),
        sorted(map(str, match.clients)),
        sorted(port for _, port in match.listen),
        *(route.servers, route.weights, route.backups, route.copies, route.split, route.stick, route.return_after),
    ]


def _entries(found: Entries) -> object:
    return sorted(found.keys), sorted(path.name for path in found.files)


def _digest(value: object) -> str:
    return hashlib.blake2b(repr(value).encode("utf-8", "surrogateescape"), digest_size=_DIGITS // 2).hexdigest()
