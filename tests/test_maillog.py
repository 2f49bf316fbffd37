"""The log is read by people and programs: whatever comes from outside, an event is one line and moves no cursor."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator

import pytest
from loguru import logger

from relay import log_lines, maillog
from relay.mail.reply import Reply

# Ends of lines of every sort, terminal sequences (C0 and C1), text that runs backwards, and octets that are no UTF-8.
FOUL = "x\r\n2026-01-01T00:00:00.000+00:00 INFO relay-1 accepted id=1\u2028\x85\x1b[2J\x9b31m\u202e\x07\udcff\0y"


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    yield
    logger.remove()


@pytest.mark.parametrize("style", ["text", "json"])
def test_what_comes_from_outside_stays_on_its_line(capsys: pytest.CaptureFixture[str], style: str) -> None:
    """Replies, addresses, names: nothing in them ends a line, starts a field or speaks to the terminal."""
    log_lines.configure("debug", style, "relay-1")
    maillog.command_refused(FOUL, FOUL, Reply.of(554, FOUL))
    maillog.deferred("id", FOUL, 1, 1, FOUL, 1.0)
    maillog.notice("error", "trouble", reason=FOUL)
    lines = capsys.readouterr().err.split("\n")
    assert len(lines) == 4
    assert lines.pop() == ""
    assert all(line.isprintable() for line in lines)
    if style == "text":
        assert not any(re.search(r'^[^"]*\sid=1', line) for line in lines)
    else:
        assert json.loads(lines[2])["reason"] == FOUL


@pytest.mark.parametrize("style", ["text", "json"])
def test_nor_in_an_exception(capsys: pytest.CaptureFixture[str], style: str) -> None:
    """The lines of a traceback are told apart from those of the log, whatever the exception says."""
    log_lines.configure("debug", style, "relay-1")
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - what it says is what this is about
        int(FOUL + "\n" + FOUL)
    caught.value.args = (FOUL,)
    maillog.session_error(FOUL, caught.value)
    first, *rest = capsys.readouterr().err.splitlines()
    assert "session error" in first
    assert first.isprintable()
    assert all(line.startswith("  ") and line.isprintable() for line in rest)
    assert bool(rest) == (style == "text")


@pytest.mark.parametrize("style", ["text", "json"])
@pytest.mark.parametrize("zone", ["UTC", "Asia/Kolkata", "America/St_Johns"])
def test_the_short_way_writes_what_the_long_one_does(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, style: str, zone: str
) -> None:
    """Events do not go through loguru, tracebacks do: who reads the log cannot tell them apart."""
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    fields = {"id": "1", "n": 3, "age": 1.5, "ok": True, "e": "", "s": 'two "words" \\', "none": None, "reply": FOUL}
    for level in ("DEBUG", "INFO", "WARNING", "ERROR"):
        log_lines.configure("info", style, "relay-1")
        log_lines.event(level, "event " + FOUL, **fields)
        logger.bind(**fields).log(level, "event " + FOUL)
        written = capsys.readouterr().err.splitlines()
        assert len(written) == (0 if level == "DEBUG" else 2)
        assert len({re.sub(r"\d\d:\d\d:\d\d\.\d{3}", "time", line, count=1) for line in written}) == len(written) // 2
    monkeypatch.undo()
    time.tzset()
