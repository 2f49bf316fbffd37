"""The look whether the spool can be written: whoever asks, and however many at once, gets what the disk says."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from relay import private_files
from relay.command import check
from relay.config import loader
from relay.config.model import Settings
from relay.monitoring import findings


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    (tmp_path / "spool").mkdir(mode=0o700)
    return loader.load(
        environ={"SMTP_DUP_RELAY_DESTINATION_PRIMARY": "127.0.0.1:25", "SMTP_DUP_STATE_DIR": str(tmp_path)},
        directories=(),
    )


def look(settings: Settings) -> str:
    (found,) = findings.spool(settings)
    return "" if found.ok else found.text


def test_many_ask_at_once(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that takes its time for each of them is no disk that hangs."""
    write = private_files.write

    def slow(*args: Any, **options: Any) -> None:
        time.sleep(0.02)
        write(*args, **options)

    monkeypatch.setattr(private_files, "write", slow)
    with ThreadPoolExecutor(8) as callers:
        assert set(callers.map(lambda _: look(settings), range(16))) == {""}


def test_a_disk_that_hangs_holds_nobody_up(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told after a bounded time, once and again, and it is well when the disk goes on."""
    goes_on = threading.Event()
    monkeypatch.setattr(findings, "_DISK_SECONDS", 0.1)
    with monkeypatch.context() as patched:
        patched.setattr(private_files, "write", lambda *_, **__: goes_on.wait())
        assert "has not taken a file" in look(settings)
        assert "has not taken a file" in look(settings)
    goes_on.set()
    monkeypatch.setattr(findings, "_DISK_SECONDS", 30.0)
    assert look(settings) == ""


def test_no_thread_can_be_started(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """That is said as it is, and the next look is another."""

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        assert "can't start new thread" in look(settings)
    assert look(settings) == ""


def test_check_says_so_without_a_write(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """It writes nothing, and says nothing where all is well."""
    monkeypatch.setattr(private_files, "write", None)
    assert check._spool(settings) == []
    monkeypatch.setattr(os, "access", lambda *_: False)  # on a file system that is read-only, for root, too
    (found,) = check._spool(settings)
    assert "cannot be written" in found.text
