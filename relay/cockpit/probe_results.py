"""What a probe has been told so far: a file in the state folder, so that one that was interrupted goes on.

A line of JSON for each answer, the last one of an address counts, under a head that says who was asked and as whom; at
the end a line that it is done. What has another head, is done or a day old is begun anew. The file is its owner's
alone, its lines are sealed where mail is (storage.key_file), and one command holds it at a time. Nothing is synced to
the disk: what a power cut takes is asked again. A line that makes no sense is none. Raises OSError.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from relay import private_files
from relay.cockpit.mailbox_probe import Exists, Probed
from relay.mail import encryption
from relay.mail.stored import any_text, number, parsed

_FRESH_SECONDS = 86400.0
_PLACE = "probe results"  # in which a line is sealed
_CHUNK = 1 << 20


class ProbeResults:
    """The answers of one probe, by address."""

    def __init__(self, state_dir: Path, name: str, head: Mapping[str, str], *, anew: bool = False) -> None:
        """Open the file, or make it. Raises BlockingIOError while another command holds it."""
        private_files.folder(state_dir)
        self.path = state_dir / f"probe-{name}.jsonl"
        self._file = private_files.open_locked(self.path)
        self.found: dict[str, Probed] = {}
        self.since: float | None = None  # when the first answer came that it goes on with
        try:
            private_files.give(self._file)
            if anew or not self._read(head):
                os.ftruncate(self._file, 0)
                self.found, self.since = {}, None
                os.lseek(self._file, 0, os.SEEK_SET)
                self._write({"head": dict(head)})
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        os.close(self._file)

    def add(self, answer: Probed) -> None:
        """Keep an answer."""
        self.found[answer.address] = answer
        self._write({**answer._asdict(), "at": round(time.time(), 3)})

    def finish(self) -> None:
        """Note that all is told: the next one begins anew."""
        self._write({"done": True})

    def _write(self, line: Mapping[str, Any]) -> None:
        text = json.dumps(line)
        if encryption.is_on():
            text = json.dumps({"sealed": encryption.seal_word(_PLACE, text)})
        rest = memoryview(f"{text}\n".encode())
        while rest:
            rest = rest[os.write(self._file, rest) :]

    def _read(self, head: Mapping[str, str]) -> bool:
        """Read what is there; returns whether it can be gone on with. Half a line at the end is taken off."""
        data = b""
        while chunk := os.pread(self._file, _CHUNK, len(data)):
            data += chunk
        whole = data[: data.rfind(b"\n") + 1]
        os.ftruncate(self._file, len(whole))
        os.lseek(self._file, 0, os.SEEK_END)
        first, *rest = whole.splitlines() or [b""]
        if _line(first).get("head") != head:
            return False
        for line in map(_line, rest):
            if line.get("done"):
                return False
            self._take(line)
        return bool(self.found)

    def _take(self, line: Mapping[str, Any]) -> None:
        with suppress(KeyError, ValueError, TypeError):
            at = number(line["at"])
            answer = Probed(
                any_text(line["address"]), Exists(line["result"]), any_text(line["text"]), line["is_accepted"] is True
            )
            if abs(time.time() - at) < _FRESH_SECONDS:
                self.found[answer.address] = answer
                self.since = at if self.since is None else self.since


def _line(data: bytes) -> Mapping[str, Any]:
    try:
        found = parsed(data)
        if isinstance(found, dict) and "sealed" in found:
            found = parsed(encryption.open_word(_PLACE, any_text(found["sealed"])))
    except (ValueError, TypeError, encryption.MissingKey):
        return {}
    return found if isinstance(found, dict) else {}
