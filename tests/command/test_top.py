"""`top` on a terminal ends when it is to, whatever it does at that moment."""

from __future__ import annotations

import os
import signal
from unittest.mock import MagicMock

import pytest

from relay.command import top


class _Finalized:
    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_ctrl_c_that_meets_a_finalizer_is_not_lost() -> None:
    """Python throws away what is raised there."""
    looks = 0

    def key(patience: float) -> str:
        nonlocal looks
        looks += 1
        if looks == 1:
            _Finalized()
        return "q" if looks > 100 else "s"

    watch = MagicMock()
    watch.press = lambda key: key != "q"
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), top._interrupts() as came:
        top._go_on(watch, MagicMock(), key, 0.0001, came)
    assert 1 <= looks < 100
    assert signal.getsignal(signal.SIGINT) is before
