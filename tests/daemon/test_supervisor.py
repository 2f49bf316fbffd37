"""The supervisor's promises, with real processes: each test runs one in a process of its own and sends it signals."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from relay.child import ChildContext
from relay.daemon.notify import notify
from relay.daemon.slots import Child
from support.running_processes import is_running
from support.supervised import Run
from support.waiting import wait_until


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    under_test = Run(tmp_path)
    yield under_test
    under_test.clean_up()


def context_switches(pid: int) -> list[str]:
    return [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if "voluntary_ctxt" in line]


def test_stages_stop_one_after_the_other(run: Run) -> None:
    """SIGTERM drains the stages in order: the next gets its signal only when all before are gone; status 0."""
    supervisor = run.start(
        "sys.exit(Supervisor([Child('redis', run=serve, stage=3), Child('relay.0', run=serve), "
        "Child('relay.1', run=serve), Child('worker', run=serve, stage=1)]).run())"
    )
    for name in ("relay.0", "relay.1", "worker", "redis"):
        run.wait_up(name)
    supervisor.terminate()
    assert run.end() == 0
    ends = [e for e in run.events if e[0] in {"term", "down"}]
    assert {e[1] for e in ends[:4]} == {"relay.0", "relay.1"}
    assert ends[4:] == [["term", "worker"], ["down", "worker"], ["term", "redis"], ["down", "redis"]]


def test_ctrl_c_reaches_children_only_through_the_supervisor(run: Run) -> None:
    """A SIGINT to the whole foreground group, as a terminal sends it, is one orderly stop."""
    supervisor = run.start(
        "sys.exit(Supervisor([Child('relay', run=serve), Child('worker', run=serve, stage=1)]).run())"
    )
    run.wait_up("relay")
    run.wait_up("worker")
    os.killpg(supervisor.pid, signal.SIGINT)
    assert run.end() == 0
    assert [e[:2] for e in run.events if e[0] == "down"] == [["down", "relay"], ["down", "worker"]]


def test_dead_child_comes_back_and_knows_its_predecessor(run: Run) -> None:
    """A killed child is started again at once, and told the pid and start of the one that it replaces."""
    supervisor = run.start("sys.exit(Supervisor([Child('worker', run=serve)]).run())")
    ((first, before),) = run.wait_up("worker")
    assert before == "None"
    began = time.monotonic()
    os.kill(first, signal.SIGKILL)
    _, (second, predecessor) = run.wait_up("worker", 2)
    assert time.monotonic() - began < 20
    assert second != first
    assert predecessor.split(".")[0] == str(first)
    assert "was ended by SIGKILL" in run.log
    supervisor.terminate()
    assert run.end() == 0


def test_restarts_slow_down(run: Run) -> None:
    """A child that dies at once again and again is started with doubling pauses."""
    run.start(
        """
        def fail(context):
            note(f"up sick {os.getpid()} {context.predecessor}")
            return 3
        sys.exit(Supervisor([Child('sick', run=fail), Child('well', run=serve)]).run())
        """
    )
    run.wait_up("sick", 4)
    run.wait_up("well")
    pauses = [f"again in {seconds} s" for seconds in ("0.1", "0.2", "0.4")]
    assert [p for p in pauses if p in run.log] == pauses
    assert "ended with status 3" in run.log
    assert len(run.ups("well")) == 1


def test_bad_settings_end_everything(run: Run) -> None:
    """A child that ends with status 2 is not started again: all is stopped and that is the status."""
    run.start("sys.exit(Supervisor([Child('relay', run=serve), Child('bad', run=lambda c: 2, stage=1)]).run())")
    assert run.end() == 2
    assert not any(is_running(pid) for pid, _ in run.ups("relay"))


def test_child_without_restart_decides(run: Run) -> None:
    """A child without restart may end well by itself; when it fails, all is stopped with its status."""
    run.start(
        """
        def later(context):
            while not any(e.startswith("up relay") for e in (folder / "events").read_text().splitlines()):
                time.sleep(0.01)
            return 7
        note("begin")
        sys.exit(Supervisor([Child('well', run=lambda c: 0, restart=False), Child('relay', run=serve),
                             Child('ill', run=later, restart=False)]).run())
        """
    )
    assert run.end() == 7
    assert ["down", "relay"] in run.events


def test_nothing_left_to_run_is_the_end(run: Run) -> None:
    """When all children have ended by themselves and none is to be restarted, the supervisor ends with 0."""
    run.start("sys.exit(Supervisor([Child('once', run=lambda c: 0, restart=False)]).run())")
    assert run.end() == 0


def test_second_signal_kills(run: Run) -> None:
    """A second signal during the drain ends everything at once, with 128 + its number."""
    (run.folder / "stubborn").touch()
    supervisor = run.start(
        "sys.exit(Supervisor([Child('relay', run=serve), Child('worker', run=serve, stage=1)]).run())"
    )
    pids = [run.wait_up(name)[0][0] for name in ("relay", "worker")]
    supervisor.terminate()
    wait_until(lambda: ["term", "relay"] in run.events, message=lambda: run.log)
    supervisor.send_signal(signal.SIGINT)
    assert run.end() == 128 + signal.SIGINT
    wait_until(lambda: not any(map(is_running, pids)))


def test_drain_has_a_limit(run: Run) -> None:
    """What does not drain in the time for it is killed, the rest still stops in order, and the status says so."""
    (run.folder / "stubborn").touch()
    supervisor = run.start(
        "sys.exit(Supervisor([Child('relay', run=serve), Child('once', run=lambda c: (signal.pause(), 0)[1], stage=1)],"
        " drain_seconds=0.3).run())"
    )
    ((pid, _),) = run.wait_up("relay")
    supervisor.terminate()
    assert run.end() == 1
    assert not is_running(pid)
    assert "killed, not drained in 0.3 s: relay" in run.log


def test_children_of_a_killed_supervisor_drain(run: Run) -> None:
    """A supervisor that is killed without a word leaves no orphan: its children drain by themselves."""
    supervisor = run.start("sys.exit(Supervisor([Child('relay', run=serve), Child('worker', run=serve)]).run())")
    pids = [run.wait_up(name)[0][0] for name in ("relay", "worker")]
    supervisor.kill()
    wait_until(lambda: sum(e[0] == "down" for e in run.events) == 2, message=lambda: str(run.events))
    wait_until(lambda: not any(map(is_running, pids)))


def test_reload_is_passed_on(run: Run) -> None:
    """SIGHUP reaches every child and stops nothing, not even a child that does not know it."""
    supervisor = run.start(
        """
        def deaf(context):
            note(f"up deaf {os.getpid()} {context.predecessor}")
            signal.signal(signal.SIGTERM, lambda *_: None)
            signal.pause()
            return 0
        sys.exit(Supervisor([Child('relay', run=serve), Child('deaf', run=deaf)]).run())
        """
    )
    run.wait_up("relay")
    run.wait_up("deaf")
    supervisor.send_signal(signal.SIGHUP)
    wait_until(lambda: ["reload", "relay"] in run.events, message=lambda: run.log)
    supervisor.terminate()
    assert run.end() == 0
    assert len(run.ups("deaf")) == 1


def test_a_signal_before_it_listens(run: Run) -> None:
    """SIGHUP in the start is kept until it can be obeyed; SIGUSR1 ends nobody, now or later, nor does SIGUSR2."""
    supervisor = run.start(
        """
        from relay.daemon.start import EarlyStop
        EarlyStop()
        for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            os.kill(os.getpid(), number)
        on_reload = lambda: note("reload asked")
        sys.exit(Supervisor([Child('relay', run=serve)], on_reload=on_reload).run())
        """
    )
    ((child, _),) = run.wait_up("relay")
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        supervisor.send_signal(number)
        os.kill(child, number)
    wait_until(lambda: ["reload", "asked"] in run.events, message=lambda: run.log)
    supervisor.terminate()
    assert run.end() == 0
    assert len(run.ups("relay")) == 1
    assert run.events.count(["reload", "asked"]) == 1


def test_program_is_launched_watched_and_released(run: Run) -> None:
    """A launched program is started first, again when it dies, released after each end, and stopped last."""
    supervisor = run.start(
        """
        def launch():
            process = subprocess.Popen(["sleep", "600"], process_group=0)
            note(f"up program {process.pid} -")
            return process
        def release(process):
            note(f"released {process.pid} {os.getpid()}")
        note(f"supervisor {os.getpid()}")
        program = Child('program', launch=launch, release=release, stage=3)
        sys.exit(Supervisor([Child('relay', run=serve), program]).run())
        """
    )
    run.wait_up("relay")
    ((first, _),) = run.wait_up("program")
    os.kill(first, signal.SIGKILL)
    _, (second, _) = run.wait_up("program", 2)
    supervisor.terminate()
    assert run.end() == 0
    own = [int(e[1]) for e in run.events if e[0] == "released" and e[2] == str(supervisor.pid)]
    assert own == [first, second]
    relay = run.ups("relay")[0][0]
    assert ["released", str(first), str(relay)] in run.events  # a fork holds nothing of it
    assert run.events.index(["down", "relay"]) < run.events.index(["released", str(second), str(supervisor.pid)])


def test_program_that_cannot_be_launched_is_an_error(run: Run) -> None:
    """An exception of the first launch is the caller's, with nothing left running."""
    run.start(
        """
        def launch():
            raise OSError("no such program")
        try:
            Supervisor([Child('redis', launch=launch, stage=0), Child('relay', run=serve, stage=1)]).run()
        except OSError as error:
            sys.exit(str(error))
        """
    )
    assert run.end() == 1
    assert "no such program" in run.log
    assert not any(is_running(pid) for pid, _ in run.ups("relay"))


def test_idle_costs_nothing(run: Run) -> None:
    """A supervisor with nothing to do sleeps: it does not poll."""
    supervisor = run.start("sys.exit(Supervisor([Child('relay', run=serve)]).run())")
    run.wait_up("relay")

    def sleeps_through() -> bool:
        """Watch it for a while; the first times it may still be starting."""
        before = context_switches(supervisor.pid)
        until = time.monotonic() + 0.7
        wait_until(lambda: time.monotonic() > until)
        return context_switches(supervisor.pid) == before

    wait_until(sleeps_through, timeout=5)


def test_systemd_is_told(run: Run) -> None:
    """READY=1 goes to NOTIFY_SOCKET when all is started, STOPPING=1 at the stop."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(run.folder / "notify"))
        manager.settimeout(20)
        supervisor = run.start(
            "sys.exit(Supervisor([Child('relay', run=serve)]).run())", NOTIFY_SOCKET=str(run.folder / "notify")
        )
        assert manager.recv(100) == b"READY=1"
        run.wait_up("relay")
        supervisor.terminate()
        assert manager.recv(100) == b"STOPPING=1"
        assert run.end() == 0


def test_nobody_to_tell_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A manager that is not there does not matter."""
    monkeypatch.setenv("NOTIFY_SOCKET", "/nowhere/notify")
    notify("READY=1")
    monkeypatch.delenv("NOTIFY_SOCKET")
    notify("READY=1")


@pytest.mark.parametrize("kinds", [{}, {"run": lambda _: 0, "launch": lambda: None}])
def test_child_is_one_of_two_kinds(kinds: dict[str, Callable[..., object]]) -> None:
    """A child is a function or a program, never both or neither."""
    with pytest.raises(ValueError, match="either run or launch"):
        Child("relay", **kinds)


def test_context_is_plain() -> None:
    """A child's context says who it is without any lookup."""
    assert ChildContext("worker", "12.34").predecessor is None


def test_further_children_come_and_go(run):
    """Whom the roster names is started, kept alive, and drained when no longer named; its silence changes nothing."""
    run.start(
        """
        from relay.daemon import supervisor
        supervisor._ROSTER_EVERY = 0.05
        wanted = folder / "wanted"

        def roster():
            return [Child(name, run=serve) for name in wanted.read_text().split()] if wanted.exists() else None

        sys.exit(Supervisor([Child("a", run=serve)], roster=roster).run())
        """
    )
    run.wait_up("a")
    wanted = run.folder / "wanted"
    wanted.write_text("b c")
    ((first, _),) = run.wait_up("b")
    run.wait_up("c")
    os.kill(first, signal.SIGKILL)
    assert run.wait_up("b", 2)[1][1].startswith(f"{first}.")
    wanted.unlink()
    wanted.with_name("next").write_text("c")
    wanted.with_name("next").rename(wanted)
    wait_until(lambda: ["down", "b"] in run.events, message=lambda: run.log)
    wait_until(lambda: "not needed any more" in run.log)
    wanted.write_text("b c")
    run.wait_up("b", 3)
    run.process.send_signal(signal.SIGTERM)
    assert run.end() == 0
    assert [e[1] for e in run.events if e[0] == "down"].count("b") == 2
    assert len(run.ups("a")) == len(run.ups("c")) == 1


def test_a_signal_at_the_very_end_of_a_child(run):
    """A child that answers SIGTERM with SystemExit ends alone, also when it comes while its last words are written."""
    run.start(
        """
        class Last:
            def flush(self):
                os.kill(os.getpid(), signal.SIGTERM)

        def brief(context):
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
            sys.stdout = Last()
            note("brief")
            return 0

        status = Supervisor([Child("a", run=serve), Child("brief", run=brief, restart=False)]).run()
        note(f"supervisor {os.getpid()}")
        sys.exit(status)
        """
    )
    run.wait_up("a")
    wait_until(lambda: "brief (process" in run.log or ["brief"] in run.events)
    run.process.send_signal(signal.SIGTERM)
    assert run.end() == 0
    assert [e for e in run.events if e[0] == "supervisor"] == [["supervisor", str(run.process.pid)]]
    assert ["down", "a"] in run.events
