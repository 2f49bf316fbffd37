"""Messages a second until both targets have everything, against everything else that is installed."""

from __future__ import annotations

from bench import content, measure, peers
from bench.course import Course, Stage
from bench.measure import Run
from bench.peers import Peer
from bench.results import Curve, Row
from bench.source import Load

MODES = {"new connections": False, "kept connections": True}
_CALIBRATE = 300
_FEWEST, _MOST = 500, 60_000  # messages of one load


def run(course: Course) -> Row:
    """Run every peer in turn, round after round, with both kinds of connections."""
    row = Row("throughput", "Throughput, drained", bars=tuple(f"{mode}, drained" for mode in MODES))
    options = course.options
    steps = (options.rounds + 1) * len(MODES) * len(options.peers or peers.NAMES)
    with course.row(row, steps) as stage:
        field = peers.competitors(stage.stack, stage.folder, options.peers)
        message = content.file(stage.folder, options.size)
        loads = {
            (peer.name, mode): sized(course, stage, peer, Load(1, message, options.sessions, kept))
            for mode, kept in MODES.items()
            for peer in field
        }
        runs: dict[tuple[str, str], list[Run]] = {key: [] for key in loads}
        for turn in range(options.rounds):
            # Each begins a round in turn: what follows whom is not always the same.
            order = field[turn % len(field) :] + field[: turn % len(field)]
            for mode in MODES:
                for peer in order:
                    result = one(stage, peer, loads[peer.name, mode], f"{mode}, round {turn + 1}")
                    if result.drained:
                        runs[peer.name, mode].append(result)
        _tell(row, field, runs)
    return row


def one(stage: Stage, peer: Peer, load: Load, label: str) -> Run:
    """Run one load on a peer, and say what came out."""
    result = measure.run(peer, load)
    for fault in result.faults:
        stage.fault(f"{label}: {fault}")
    cpu = f"{sum(result.cpu.values()):.2f} ms of a core each, " if result.cpu else ""
    stage.step(
        f"{label}: {peer.name}: {load.count} messages, {result.accepted_rate:,.0f}/s accepted, "
        f"{result.drained_rate:,.0f}/s drained, {cpu}nothing pending {result.clearing:.2f} s after the last"
    )
    return result


def sized(course: Course, stage: Stage, peer: Peer, load: Load) -> Load:
    """Warm a peer up, and return a load that keeps it busy for as long as was asked for."""
    result = one(stage, peer, load.of(course.options.scaled(_CALIBRATE, 100)), "warm-up")
    if course.options.quick:
        return load.of(200)
    return load.of(round(min(_MOST, max(_FEWEST, result.drained_rate * course.options.seconds))))


def _tell(row: Row, field: list[Peer], runs: dict[tuple[str, str], list[Run]]) -> None:
    for peer in field:
        for mode in MODES:
            found = runs[peer.name, mode]
            row.add(peer.name, f"{mode}, accepted", "msg/s", [r.accepted_rate for r in found])
            row.add(peer.name, f"{mode}, drained", "msg/s", [r.drained_rate for r in found])
            row.add(peer.name, f"{mode}, processor time", "ms a message", [sum(r.cpu.values()) for r in found if r.cpu])
            row.add(peer.name, f"{mode}, until nothing is pending", "s", [r.clearing for r in found])
    for mode, postfix in zip(MODES, (5, 10), strict=True):
        ours = ("smtp-dup", f"{mode}, drained")
        row.goal_ratio(f"drained against Postfix with a copy, {mode}", ours, ("Postfix with a copy", ours[1]), postfix)
        for plain in ("plain relay", "plain relay, pooled"):
            row.goal_ratio(f"drained against a {plain} without durability, {mode}", ours, (plain, ours[1]), 1.0)
    kept = "kept connections, drained"
    row.goal_ratio("drained against the same in C, kept", ("smtp-dup", kept), ("the same in C", kept), 1 / 1.5)
    for mode in MODES:
        for peer in field:
            if len(peer.targets) > 1 and (found := runs[peer.name, mode]):
                row.curves += arrivals(found[-1], f"messages at the targets, {mode}", peer.name)
        if found := runs.get(("smtp-dup", mode), []):
            row.curves += [pending(r, f"copies pending, {mode}", f"round {n}") for n, r in enumerate(found, 1)]


def arrivals(result: Run, plot: str, label: str) -> list[Curve]:
    """Return what the first and the last target had over time."""
    times = [sample.at for sample in result.samples]
    return [
        Curve(plot, f"{label}, {name}", times, [sample.arrived[place] for sample in result.samples])
        for name, place in (("primary", 0), ("backup", -1))
    ]


def pending(result: Run, plot: str, label: str) -> Curve:
    """Return the copies that were pending over time."""
    return Curve(plot, label, [s.at for s in result.samples], [s.pending for s in result.samples])
