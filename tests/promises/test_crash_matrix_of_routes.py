"""Kill anything anywhere while routes, moved mailboxes and forks are in use and are changed all the time.

What got our 2xx is, for each recipient, at the server that answered and at every other that it is owed to; no
recipient's message has two primaries, and each further copy is explained.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from relay import faultpoints
from support.busy_routes import NAMES, SETTINGS, Operator, audit, files, recipients
from support.killed_at import VICTIMS, kill
from support.product import SOON, Product
from support.retrying_sender import Sender
from support.scripted_server import ScriptedServer
from support.waiting import wait_until

WAITS = SOON

POINTS = {
    "before staging": 10,
    "staged": 10,
    "dot sent": 10,
    "leg answered": 4,
    "primary answered": 10,
    "released": 10,
    "map written": 2,
    "job fetched": 1,
    "backup answered": 10,
    "before settle": 2,
}
USUAL = {("dot sent", "itself"), ("map written", "supervisor"), ("before settle", "redis")}
COUNT = 48


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("point", "victim"),
    [
        pytest.param(point, victim, marks=[] if (point, victim) in USUAL else pytest.mark.long)
        for point in POINTS
        for victim in VICTIMS
    ],
)
def test_killed_at(
    product: Callable[..., Product],
    scripted: Callable[..., ScriptedServer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    point: str,
    victim: str,
) -> None:
    """SIGKILL of the process at this point, of everything, or of Redis under it: nothing is lost anywhere."""
    servers = {name: scripted() for name in NAMES}
    reached = tmp_path / "reached"
    monkeypatch.setenv(faultpoints.VARIABLE, f"{point}:{POINTS[point]}:{reached}")
    relay = product(primary=f"old={servers['old'].address}", files=files(servers), settings=SETTINGS)
    operator = Operator(relay, servers, COUNT)
    operator.do(2)
    sender = Sender(relay.smtp_port, range(COUNT), recipients=recipients, patience=120).start()
    operator.start()
    wait_until(reached.exists, 60, lambda: f"nobody reached {point!r}: {operator.done}, {relay.log[-3000:]}")
    kill(relay, victim)
    if victim == "supervisor":
        monkeypatch.delenv(faultpoints.VARIABLE)
        relay.start()
    accepted = sender.join()
    operator.end()
    assert accepted == set(range(COUNT)), relay.log[-6000:]
    assert ("move --file", 0) in operator.done
    audit(relay, servers, sender)
