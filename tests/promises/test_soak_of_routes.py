"""Routes, moved mailboxes and forks, changed all the time while everything is killed and stalled at random.

The disturbances are those of bench/soak.py; the audit is that of the crash matrix of routes.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

import pytest

from bench.disturbances import Disturbance, Disturber
from support.busy_routes import NAMES, SETTINGS, Operator, audit, files, recipients
from support.product import Product
from support.reactions import Close, Delay, Reset, Silence
from support.retrying_sender import Sender
from support.scripted_server import ScriptedServer

_MOODS: dict[str, dict[str, object]] = {
    "tempfail": {"RCPT": "450 4.2.0 later"},
    "greylist": {"MAIL": "451 4.7.1 later"},
    "busy": {"MAIL": ("421 4.3.2 busy", Close())},
    "reset": {".": Reset()},
    "slow": {".": (Delay(0.5), None)},
    "stall": {".": Silence()},
}


class Moody:
    """A scripted server, as a disturber upsets one: told its mood, or stopped and let go on."""

    refuses = False

    def __init__(self, name: str, server: ScriptedServer) -> None:
        self.name = name
        self.process = self  # what is signalled
        self._server = server

    def turn(self, mood: str) -> None:
        self._server.replies.clear()
        if mood == "down":
            self._server.down()
        else:
            self._server.listen()
            self._server.replies.update(_MOODS.get(mood, {}))

    def send_signal(self, number: int) -> None:
        self.turn("stall" if number == signal.SIGSTOP else "well")


@pytest.mark.long
@pytest.mark.timeout(400)
@pytest.mark.parametrize("seed", [1, 2])
def test_soak(product: Callable[..., Product], scripted: Callable[..., ScriptedServer], seed: int) -> None:
    """What got a 2xx is at each server that it is owed to, answered for once, and every duplicate has its line."""
    servers = {name: scripted() for name in NAMES}
    settings = {**SETTINGS, "smtp.processes": "2", "relay.final_timeout_seconds": "4", "workers.sweep": "5"}
    relay = product(primary=f"old={servers['old'].address}", files=files(servers), settings=settings)
    done: list[Disturbance] = []
    disturber = Disturber(relay, [Moody(name, servers[name]) for name in NAMES], seed, done.append)
    count = 2000
    operator = Operator(relay, servers, 200)
    operator.do(2)
    sender = Sender(relay.smtp_port, range(count), recipients=recipients, sessions=6, patience=150).start()
    operator.start()
    try:
        end, following = time.monotonic() + 45, 0.0
        while time.monotonic() < end and len(sender.accepted) < count:
            sender.pause_at(count * (len(done) + 1) // 12)  # a fast machine is not done before there was any trouble
            disturber.look()
            if time.monotonic() >= following:
                following = time.monotonic() + disturber.step()
            time.sleep(0.05)  # as the soak does: disturbances come by the clock
        sender.pause_at(count)
        disturber.end()
        operator.end()
        accepted = sender.join()
        assert len(done) > 10, done
        assert len(accepted) == count, f"{len(accepted)} of {count}: {relay.log[-6000:]}"
        audit(relay, servers, sender, 150)
    finally:
        sender.stop()
        disturber.clean_up()
