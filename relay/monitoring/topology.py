"""What `check`, /readyz and /metrics say of who is the primary, and of which relay process follows."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import GaugeMetricFamily, Metric

from relay.config.model import Settings
from relay.mail.text import count
from relay.monitoring.probe_result import ProbeResult
from relay.topology import promotion
from relay.topology.agreement import behind_with_moves, differences
from relay.topology.decisions import View
from relay.topology.heartbeats import Heartbeat
from relay.topology.roles import disagreement

SUBJECT = "topology"
MOVED = "moved"
HOSTS = "settings of hosts"
FAILOVER = "failover from "


def about_topology(settings: Settings, seen: View) -> Iterator[ProbeResult]:
    """Say whether settings and topology agree, and whether everybody follows; nothing before the first promotion."""
    troubles = [f"{beat.label}: {beat.trouble}" for beat in seen.living if beat.trouble]
    late = [beat for beat in seen.living if not beat.trouble and not seen.follows(beat)]
    troubles += [f"{beat.label} has not followed: {_what_it_does(seen, beat)}" for beat in late]
    if seen.nonsense:
        troubles.append(f"what Redis holds as topology makes no sense: {seen.nonsense}")
    if troubles:
        yield ProbeResult(SUBJECT, False, "; ".join(troubles))
    elif seen.topology:
        now = seen.topology.now
        yield ProbeResult(SUBJECT, True, f"{now.primary} is the primary (epoch {now.epoch}), {_who_follow(seen)}")
    yield from _about_moved(seen)
    away: dict[str, list[str]] = {}
    for beat in seen.living:
        for name in beat.down:
            away.setdefault(name, []).append(beat.label)
    for name, labels in sorted(away.items()):
        text = f"cannot be used by {', '.join(labels)}, so that others of its route answer"
        yield ProbeResult(f"{FAILOVER}{name}", False, text)
    if others := "; ".join(differences(seen)):
        yield ProbeResult(HOSTS, False, others)
    if words := disagreement(settings, promotion.latest(seen, settings)):  # as it may be for days: mail goes on
        yield ProbeResult("settings", True, words)


def _about_moved(seen: View) -> Iterator[ProbeResult]:
    """Say how many mailboxes have moved, and who does not go by that."""
    if troubles := list(behind_with_moves(seen)):
        yield ProbeResult(MOVED, False, "; ".join(troubles))
    elif seen.moves is not None:
        servers = ", ".join(f"{number} at {name}" for name, number in sorted(seen.moves.servers.items())) or "nobody"
        yield ProbeResult(MOVED, True, f"{servers} (generation {seen.moves.generation}), {_who_follow(seen)}")


def _who_follow(seen: View) -> str:
    return count(len(seen.living), "relay process follows", "relay processes follow")


def _what_it_does(seen: View, beat: Heartbeat) -> str:
    decided = seen.topology.now.routes if seen.topology else {}
    if seen.topology and beat.primary == seen.topology.primary and beat.routes is None and decided:
        return f"smtp-dup {beat.version} there knows no decision about routes"
    return f"it takes {beat.primary} for the primary"


def families(seen: View) -> Iterator[Metric]:
    """Yield the metrics of the roles."""
    text = "How often a server has been promoted; 0: the settings say who is the primary"
    yield GaugeMetricFamily("smtpdup_topology_epoch", text, value=seen.epoch)
    roles = GaugeMetricFamily(
        "smtpdup_role", "1 for the role that a server has since the last promotion", labels=["destination", "role"]
    )
    if seen.topology:
        roles.add_metric([seen.topology.primary, "primary"], 1)
        for name in seen.topology.now.backups:
            roles.add_metric([name, "backup"], 1)
    yield roles
    text = "Relay processes, over all hosts, that have been heard of within ten seconds"
    yield GaugeMetricFamily("smtpdup_relays", text, value=len(seen.living))
    text = "Those of them that follow the last promotion"
    yield GaugeMetricFamily("smtpdup_topology_followers", text, value=sum(map(seen.follows, seen.living)))
    text = "Addresses and domains that have moved, by the server that answers for them"
    moved = GaugeMetricFamily("smtpdup_moved_mailboxes", text, labels=["destination"])
    for name, number in seen.moves.servers.items() if seen.moves else ():
        moved.add_metric([name], number)
    yield moved
    text = "The generation of the map of who has moved; 0: nobody ever has"
    yield GaugeMetricFamily("smtpdup_moved_generation", text, value=seen.moves.generation if seen.moves else 0)
    text = "Relay processes, over all hosts, that go by who has moved as Redis has it"
    yield GaugeMetricFamily("smtpdup_moved_followers", text, value=sum(map(seen.goes_by_moves, seen.living)))
