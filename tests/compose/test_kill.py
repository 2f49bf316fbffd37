"""`docker compose kill` under load, each service and then all at once, and `up` again: the audit finds nothing missing.

Unlike a process that dies in a container, what was killed by intent stays dead until somebody starts it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from support import compose_stack
from support.compose_stack import Stack, outside
from support.retrying_sender import Sender
from support.scripted_server import ScriptedServer
from support.waiting import wait_until

pytestmark = [pytest.mark.compose, pytest.mark.timeout(900)]

SETTLED_SECONDS = 240.0  # two sweeps of the reconciler, and what is uncertain becomes due in between
KILLS: tuple[tuple[str, ...], ...] = (("redis",), ("relay",), ("workers",), ("relay", "redis"), ())  # (): all


@pytest.fixture
def ends() -> Iterator[ExitStack]:
    if reason := compose_stack.unavailable():
        pytest.skip(reason)
    with ExitStack() as stack:
        yield stack


def server(ends: ExitStack) -> ScriptedServer:
    made = compose_stack.server()
    ends.callback(made.stop)
    return made


def numbers(at: ScriptedServer) -> Counter[int]:
    return Counter(int(m.header("Subject") or -1) for m in at.messages)


def ids(at: ScriptedServer) -> dict[int, set[str]]:
    """Return our ids of each message."""
    found: dict[int, set[str]] = {}
    for m in at.messages:
        found.setdefault(int(m.header("Subject") or -1), set()).add(
            m.wire.split(b" id ", 1)[1].split(b";", 1)[0].decode()
        )
    return found


def is_settled(stack: Stack, backup: ScriptedServer, accepted: set[int]) -> bool:
    return (
        len(backup.messages) >= len(accepted) and stack.summary()["pending"] == 0 and accepted <= set(numbers(backup))
    )


def test_killed_under_load_and_started_again(ends: ExitStack, tmp_path: Path) -> None:
    """Accepted is at the primary and at the backup; what came twice is explained by a line of the log with its id."""
    primary, backup = server(ends), server(ends)
    variables = {
        "SMTP_DUP_RELAY_DESTINATION_PRIMARY": outside(primary),
        "SMTP_DUP_RELAY_DESTINATION_BACKUPS": outside(backup),
        "SMTP_DUP_RETRY_FIRST": "1s",
        "SMTP_DUP_RETRY_LONGEST": "2s",
        "SMTP_DUP_RELAY_UNCERTAIN_HOLD": "5s",
        "SMTP_DUP_SPOOL_MIN_FREE": "1M",
        "DASHBOARD_PASSWORD": "correct horse",
    }
    stack = Stack(tmp_path, variables)
    ends.callback(stack.remove)
    stack.compose("build", timeout=compose_stack.BUILD_SECONDS)
    stack.up()
    sender = Sender(stack.smtp_port, range(1_000_000), patience=600).start()
    ends.callback(sender.stop)
    wait_until(lambda: len(sender.accepted) > 50, 60)
    for services in KILLS:
        before = len(sender.accepted)
        stack.compose("kill", *services)
        if "relay" not in services and services:
            wait_until(lambda b=before: len(sender.accepted) > b + 20, 60)
        stack.up()
        before = len(sender.accepted)
        wait_until(lambda b=before: len(sender.accepted) > b + 50, 60)
    sender.stop()
    accepted = sender.join()
    wait_until(
        lambda: is_settled(stack, backup, accepted),
        SETTLED_SECONDS,
        lambda: f"missing: {sorted(accepted - set(numbers(backup)))}, {stack.summary()}",
        interval=1.0,
    )
    assert accepted <= set(numbers(primary))
    assert accepted <= set(numbers(backup))
    log = stack.run("logs", "--no-log-prefix").stdout
    told = [line for line in log.splitlines() if "may repeat" in line or "uncertain" in line]
    once, copies = numbers(primary), ids(backup)
    more = {n for n, count in numbers(backup).items() if count > once[n]}
    assert not {n for n in more if not any(i in line for i in copies[n] for line in told)}
