"""A child that lives and does nothing is told of, and killed when that lasts; nobody else is."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from relay.daemon.signs_of_life import LOOK_SECONDS, SignOfLife
from support.product import Product
from support.scripted_server import ScriptedServer
from support.supervised import Run
from support.waiting import wait_until

_PROGRAM = """
from relay.daemon import standstill

standstill.LOOK_SECONDS, standstill.TOLD_AFTER, standstill.KILLED_AFTER = 0.1, 1.0, float(os.environ["KILLED_AFTER"])

def work(context):
    context.lives()
    note(f"up {context.name} {os.getpid()} {context.predecessor}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    while True:
        context.lives()
        time.sleep(0.02)

def silent(context):
    note(f"up {context.name} {os.getpid()} {context.predecessor}")
    signal.sigwait({signal.SIGTERM})
    return 0

sys.exit(Supervisor([Child('worker', run=work), Child('other', run=work), Child('silent', run=silent)]).run())
"""


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    under_test = Run(tmp_path)
    yield under_test
    under_test.clean_up()


def test_stopped_for_good(run: Run) -> None:
    """It is told of, killed, and another takes its place; who never gave a sign is not judged."""
    supervisor = run.start(_PROGRAM, KILLED_AFTER="2")
    ((pid, _),) = run.wait_up("worker")
    run.wait_up("silent")
    os.kill(pid, signal.SIGSTOP)
    run.wait_up("worker", 2)
    assert f"worker (process {pid}) stands still" in run.log
    assert f"worker (process {pid}) killed: it has stood still" in run.log
    assert len(run.ups("other")) == len(run.ups("silent")) == 1
    assert "silent (process" not in run.log
    supervisor.terminate()
    assert run.end() == 0


def test_stopped_for_a_while(run: Run) -> None:
    """It is told of, and that it goes on; it is the same process."""
    supervisor = run.start(_PROGRAM, KILLED_AFTER="300")
    ((pid, _),) = run.wait_up("worker")
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: f"worker (process {pid}) stands still" in run.log)
    os.kill(pid, signal.SIGCONT)
    wait_until(lambda: f"worker (process {pid}) goes on" in run.log)
    assert len(run.ups("worker")) == 1
    supervisor.terminate()
    assert run.end() == 0


def test_time_that_the_supervisor_did_not_see_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that was suspended for an hour has no dead processes; one that is awake sees them."""
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    sign = SignOfLife()
    sign.give()
    assert sign.look() == 0.0
    clock[0] += 3600.0
    assert sign.look() <= 2 * LOOK_SECONDS
    sign.give()
    assert sign.look() == 0.0
    for _ in range(6):
        clock[0] += LOOK_SECONDS
        silent = sign.look()
    assert silent == pytest.approx(6 * LOOK_SECONDS)
    sign.close()


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize("shared", [False, True])
def test_every_process_of_the_product(
    product: Callable[..., Product], primary: ScriptedServer, backup: ScriptedServer, shared: bool
) -> None:
    """Each that is stopped is named in the log; a relay also by /healthz, a worker by /readyz; then all goes on."""
    up = product(
        primary=primary.address,
        backups=[backup.address],
        settings={"workers.shared_above": "0" if shared else "5", "smtp.processes": "2"},
    )
    worker = "worker-shared" if shared else f"worker-{backup.address}-1"
    names = ["relay-1", worker]
    children = {name: up.child(name) for name in [*names, "housekeeping"]}
    up.send("a@example.com", "b@example.com")
    backup.wait_for(1)
    for name in names:
        children[name].signal(signal.SIGSTOP)
    for name in names:
        up.wait_for_log(f"{name} (process {children[name].pid}) stands still", 90)
    wait_until(lambda: "relay-1" in up.get("/healthz")[1])
    assert up.get("/healthz")[0] == 503
    assert f"no sign of life from relay-1 (process {children['relay-1'].pid}), {worker}" in up.get("/readyz")[1]
    for name in names:
        children[name].signal(signal.SIGCONT)
    for name in names:
        up.wait_for_log(f"{name} (process {children[name].pid}) goes on")
    wait_until(lambda: up.get("/healthz")[0] == 200)
    if not shared:
        children["housekeeping"].signal(signal.SIGSTOP)
        up.wait_for_log(f"housekeeping (process {children['housekeeping'].pid}) stands still", 90)
        children["housekeeping"].signal(signal.SIGCONT)
    up.send("a@example.com", "c@example.com")
    backup.wait_for(2)
    assert up.stop() == 0
