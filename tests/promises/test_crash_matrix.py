"""Kill anything anywhere: what got our 2xx is at the primary and at the backup, and every extra copy is explained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from relay import faultpoints
from relay.handover.frames import folder_of
from support.drained import is_drained
from support.killed_at import VICTIMS, kill
from support.product import QUICK, SOON, Product
from support.retrying_sender import Sender
from support.scripted_server import ScriptedServer
from support.waiting import wait_until

WAITS = SOON

RELAY_POINTS = [
    "before staging",
    "staged",
    "dot sent",
    "primary answered",
    "released",
    "before hand-over",
    "handed over",
]
FROM_MEMORY = ("before hand-over", "handed over", "taken from memory")
WORKER_POINTS = ["job fetched", "taken from memory", "body sent", "backup answered", "before settle"]
SETTINGS = {
    **QUICK,
    "relay.timeout_seconds": "5",
    "relay.final_timeout_seconds": "10",
    "relay.uncertain_hold": "1",
    "redis.timeout_seconds": "2",
    "smtp.processes": "1",
}
# A job takes many copies with it, so few jobs are fetched; the other points are passed once for each message or group.
PASSES = {"job fetched": 1, "before settle": 2, **dict.fromkeys(FROM_MEMORY, 1)}
CASES = [(point, victim, "true") for point in RELAY_POINTS + WORKER_POINTS for victim in VICTIMS]
CASES += [(point, victim, "false") for point in ("primary answered", "released") for victim in VICTIMS]


@pytest.mark.timeout(180)
@pytest.mark.parametrize(("point", "victim", "await_release"), CASES)
def test_killed_at(
    product: Callable[..., Product],
    primary: ScriptedServer,
    backup: ScriptedServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    point: str,
    victim: str,
    await_release: str,
) -> None:
    """SIGKILL of the process at this point, of everything, or of Redis under it: nothing is lost."""
    reached = tmp_path / "reached"
    monkeypatch.setenv(faultpoints.VARIABLE, f"{point}:{PASSES.get(point, 10)}:{reached}")
    settings = {**SETTINGS, "relay.await_release": await_release}
    pair = product(primary=primary.address, backups=[backup.address], settings=settings)
    if point in FROM_MEMORY:
        wait_until(lambda: hands_over(pair), message="the relay has not found the worker")
    sender = Sender(pair.smtp_port, range(60)).start()
    wait_until(reached.exists, 30, f"nobody reached {point!r}")
    kill(pair, victim)
    if victim == "supervisor":
        monkeypatch.delenv(faultpoints.VARIABLE)
        pair.start()
    accepted = sender.join()
    assert accepted == set(range(60))
    wait_until(lambda: is_drained(pair), 60, lambda: f"not drained: {pair.log[-6000:]}")

    at_primary = Counter(int(m.header("Subject") or -1) for m in primary.messages)
    at_backup = Counter(int(m.header("Subject") or -1) for m in backup.messages)
    assert accepted <= set(at_primary)
    assert accepted <= set(at_backup)
    # A second copy has a second delivery by the primary as its reason, or a line in the log with its id.
    log = pair.log
    ids = {m.header("Subject"): m.wire.split(b" id ", 1)[1].split(b";", 1)[0].decode() for m in backup.messages}
    for number, count in at_backup.items():
        if count > at_primary[number]:
            assert any(
                ids[str(number)] in line and ("may repeat" in line or "uncertain" in line) for line in log.splitlines()
            ), f"{number} came {count} times without a reason"


def hands_over(pair: Product) -> bool:
    """Say whether the relay is connected to the worker: its socket is there twice then."""
    names = [path.name for path in folder_of(pair.state_dir).glob("*.sock")]
    return any(Path("/proc/net/unix").read_text("utf-8").count(f"/.{name}.new\n") > 1 for name in names)
