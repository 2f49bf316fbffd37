"""Behind a Postfix with a transport map, and the same Postfix straight to the primary."""

from __future__ import annotations

from bench import content, peers
from bench.course import Course
from bench.peers import Peer
from bench.results import Row
from bench.rows import throughput
from bench.source import Load
from support import postfix_instance
from support.postfix_instance import PostfixInstance

_BEHIND, _ALONE = "Postfix, then smtp-dup", "Postfix straight to the primary"


def run(course: Course) -> Row:
    """Send to Postfix, new connections and kept ones."""
    row = Row("behind-postfix", "Behind a Postfix", bars=tuple(f"{mode}, drained" for mode in throughput.MODES))
    options = course.options
    if reason := postfix_instance.unavailable():
        row.notes.append(f"not run: {reason}")
        return row
    with course.row(row, (options.rounds + 1) * 2 * len(throughput.MODES)) as stage:
        relay = peers.smtp_dup(stage.stack, stage.folder)
        front = stage.stack.enter_context(PostfixInstance.front(relay.port))
        behind = Peer(_BEHIND, front.port, relay.targets, relay.pending, relay.faults)
        alone = peers.postfix_alone(stage.stack)
        alone.name = _ALONE
        message = content.file(stage.folder, options.size)
        for mode, kept in throughput.MODES.items():
            load = Load(1, message, options.sessions, kept)
            loads = {peer.name: throughput.sized(course, stage, peer, load) for peer in (behind, alone)}
            rates: dict[str, list[float]] = {_BEHIND: [], _ALONE: []}
            for turn in range(options.rounds):
                for peer in (behind, alone) if turn % 2 else (alone, behind):
                    result = throughput.one(stage, peer, loads[peer.name], f"{mode}, round {turn + 1}")
                    if result.drained:
                        rates[peer.name].append(result.drained_rate)
            for name, found in rates.items():
                row.add(name, f"{mode}, drained", "msg/s", found)
            text = f"behind a Postfix against Postfix straight to the primary, {mode}"
            row.goal_ratio(text, (_BEHIND, f"{mode}, drained"), (_ALONE, f"{mode}, drained"), 0.95)
    return row
