"""A supervisor changes generations: children of new settings come up beside the former, which then leave."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from relay.daemon.child_status import ChildStatus
from relay.daemon.slots import Child, Slot
from support.running_processes import is_running
from support.supervised import Run
from support.waiting import wait_until

RENEWING = """
from relay.daemon.renewal import Renewal

def member(name, generation, run=None):
    def be(context):
        others = (context.living() or set()) - {context.instance}
        note(f"is {context.name} {context.generation} {context.seat} {len(others)}")
        if not (folder / "late").exists():
            context.ready()
        return serve(context)
    return Child(name, run=run or be, generation=generation, bury=lambda seat: note(f"buried {name} {seat}"))

def renew(names=("a", "b"), run=None, seconds=30):
    supervisor.renew(Renewal(
        supervisor.generation + 1, [member(name, supervisor.generation + 1, run) for name in names], None,
        lambda trouble: note(f"ended {trouble or 'well'}"), seconds))

supervisor = Supervisor([Child("ever", run=serve), member("a", 1), member("b", 1)], on_reload=renew)
"""


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    under_test = Run(tmp_path)
    yield under_test
    under_test.clean_up()


def wait_for(run: Run, *event: str) -> None:
    wait_until(lambda: list(event) in run.events, message=lambda: f"{run.events}\n{run.log}")


def start(run: Run, more: str = "") -> None:
    run.start(RENEWING + more + "\nsys.exit(supervisor.run())\n")
    for name in ("ever", "a", "b"):
        run.wait_up(name)


def test_the_former_leave_when_all_new_ones_are_ready(run: Run) -> None:
    """Each new child runs beside its former, at a seat of its own; only then the former leave. Others stay."""
    start(run)
    assert run.process
    run.process.send_signal(signal.SIGHUP)
    wait_for(run, "ended", "well")
    wait_for(run, "buried", "a", "0")
    wait_for(run, "buried", "b", "0")
    assert ["is", "a", "2", "1", "1"] in run.events, "it sees its former alive"
    ups = [run.events.index(["is", name, "2", "1", "1"]) for name in ("a", "b")]
    assert run.events.index(["ended", "well"]) > max(ups)
    assert all(run.events.index(["term", name]) > max(ups) for name in ("a", "b"))
    run.process.send_signal(signal.SIGHUP)
    wait_for(run, "is", "a", "3", "0", "1")  # the seat is free again
    wait_until(lambda: [e[:2] for e in run.events].count(["down", "a"]) == 2)
    run.process.terminate()
    assert run.end() == 0
    assert len(run.ups("ever")) == 1
    assert [e[1] for e in run.events if e[0] == "down"].count("a") == 3


def test_a_new_child_that_dies_changes_nothing(run: Run) -> None:
    """When one of the new children dies before all are ready, all of them leave, and the former never heard of it."""
    start(
        run,
        """
def die(context):
    note(f"died {context.name}")
    return 2  # which would end everything, were it not a renewal

def half():
    good, bad = member("a", 2), member("b", 2, die)
    supervisor.renew(Renewal(2, [good, bad], None, lambda trouble: note(f"ended {trouble}")))

supervisor.on_reload = half
""",
    )
    assert run.process
    before = [pid for name in ("a", "b", "ever") for pid, _ in run.ups(name)]
    run.process.send_signal(signal.SIGHUP)
    wait_until(lambda: any(e[0] == "ended" for e in run.events), message=lambda: run.log)
    ended = next(e for e in run.events if e[0] == "ended")
    assert ended[1] == "b", ended
    assert "status" in ended, ended
    wait_until(lambda: not [pid for pid, _ in run.ups("a")[1:] if is_running(pid)])
    assert all(map(is_running, before))
    os.kill(before[0], signal.SIGKILL)  # and the former are still watched
    wait_until(lambda: any(p.startswith(f"{before[0]}.") for _, p in run.ups("a")))
    run.process.terminate()
    assert run.end() == 0


def test_new_children_that_are_not_ready_in_time_leave(run: Run) -> None:
    """Children that never say that they are ready do not take over."""
    start(run, "supervisor.on_reload = lambda: renew(seconds=0.5)")
    assert run.process
    (run.folder / "late").touch()
    run.process.send_signal(signal.SIGHUP)
    wait_until(lambda: any(e[0] == "ended" for e in run.events), message=lambda: run.log)
    assert "not ready within 0.5 s: a, b" in " ".join(next(e for e in run.events if e[0] == "ended"))
    wait_until(lambda: [e[:2] for e in run.events].count(["down", "a"]) == 1)
    assert is_running(run.ups("a")[0][0])
    run.process.terminate()
    assert run.end() == 0


def test_a_stop_in_the_middle(run: Run) -> None:
    """A stop while new children come up stops both generations, in order, and says that there is no renewal."""
    start(run)
    assert run.process
    (run.folder / "late").touch()
    run.process.send_signal(signal.SIGHUP)
    run.wait_up("a", 2)
    run.wait_up("b", 2)
    run.process.terminate()
    assert run.end() == 0
    assert ["ended", "it", "is", "being", "stopped"] in run.events
    assert [e[1] for e in run.events if e[0] == "down"].count("a") == 2


def test_a_former_child_that_does_not_leave_is_killed(run: Run) -> None:
    """One that does not finish in the time for a drain is killed, and buried."""
    start(run, "supervisor.drain_seconds = 0.3")
    assert run.process
    (run.folder / "stubborn").touch()
    run.process.send_signal(signal.SIGHUP)
    wait_for(run, "buried", "a", "0")
    assert "killed, not drained in 0.3 s" in run.log
    (run.folder / "stubborn").unlink()
    run.process.terminate()
    assert run.end() == 0


def test_the_status_of_children_tells_who_lives() -> None:
    """The instances of a name are those of its running processes; who reads while it is written reads again."""
    child_status = ChildStatus()
    assert child_status.living("a") == frozenset()

    class Running:
        pid = 1

        def poll(self) -> int | None:
            return None

    slots = [Slot(Child(name, run=lambda _: 0), Running(), instance) for name, instance in (("a", "1.1"), ("a", "2.2"))]
    child_status.tell([*slots, Slot(Child("a", run=lambda _: 0), None, "3.3")])
    assert child_status.living("a") == {"1.1", "2.2"}
    child_status._memory[0] += 1  # as in the middle of a change
    assert child_status.living("a") is None
    assert child_status.failing("a") == []
