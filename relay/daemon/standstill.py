"""Children that live and do nothing: told of, and killed when it lasts.

They give signs of life (signs_of_life.py). Who leaves, or is stopped, has a deadline of its own.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterable

from loguru import logger

from relay.daemon.signs_of_life import LOOK_SECONDS
from relay.daemon.slots import Slot, send

TOLD_AFTER = 30.0  # seconds of silence
KILLED_AFTER = 300.0


class Standstill:
    """Looks at the children's signs of life from time to time."""

    def __init__(self) -> None:
        self.next_look = 0.0  # monotonic

    def look(self, slots: Iterable[Slot]) -> None:
        """Tell of who stands still, if a look is due, and kill who has for long."""
        now = time.monotonic()
        if now < self.next_look:
            return
        self.next_look = now + LOOK_SECONDS
        for slot in slots:
            if slot.sign is None or slot.process is None or slot.is_leaving:
                continue
            silent, was_still = slot.sign.look(), slot.stands_still
            slot.stands_still = silent >= TOLD_AFTER
            name, pid = slot.child.name, slot.process.pid
            if silent >= KILLED_AFTER:
                logger.error("{} (process {}) killed: it has stood still for {:.0f} s", name, pid, silent)
                send([slot], signal.SIGKILL)
            elif slot.stands_still and not was_still:
                text = "{} (process {}) stands still: no sign of life for {:.0f} s; after {:g} s it is killed"
                logger.error(text, name, pid, silent, KILLED_AFTER)
            elif was_still and not slot.stands_still:
                logger.warning("{} (process {}) goes on", name, pid)
