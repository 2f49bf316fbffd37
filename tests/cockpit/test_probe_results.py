"""The answers of a probe that was interrupted: what is gone on with, and what is begun anew."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from relay.cockpit.mailbox_probe import Exists, Probed
from relay.cockpit.probe_results import ProbeResults
from relay.mail import encryption

HEAD = {"server": "new:25", "sender": "postmaster@a.example"}
ANN = Probed("ann@a.example", Exists.YES, "250 ok", is_accepted=True)
BOB = Probed("bob@a.example", Exists.PUT_OFF, "put off: 450 later")


def found(folder: Path, head: dict[str, str] | None = None, *, anew: bool = False) -> dict[str, Probed]:
    with ProbeResults(folder, "new", head or HEAD, anew=anew) as results:
        return dict(results.found)


def test_it_goes_on(tmp_path: Path) -> None:
    """The last answer of an address counts; half a line, and one that makes no sense, is none."""
    with ProbeResults(tmp_path, "new", HEAD) as results:
        results.add(ANN)
        results.add(BOB)
        results.add(Probed("bob@a.example", Exists.NO, "550 no"))
        path = results.path
        with pytest.raises(BlockingIOError):
            found(tmp_path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert (b"ann@a.example" in path.read_bytes()) == (not encryption.is_on())
    with path.open("ab") as file:
        file.write(b'{"address": 1}\n\xff\n[]\n{"address": "carl')
    assert {one.address: one.result for one in found(tmp_path).values()} == {
        "ann@a.example": Exists.YES, "bob@a.example": Exists.NO,
    }  # fmt: skip
    with ProbeResults(tmp_path, "new", HEAD) as results:
        results.add(Probed("carl@a.example", Exists.YES, "250 ok"))
    assert len(found(tmp_path)) == 3


def test_it_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it was done, is a day old, was about another server or sender, or is asked for."""
    for ask in (
        lambda: found(tmp_path, {**HEAD, "server": "other:25"}),
        lambda: found(tmp_path, {**HEAD, "sender": ""}),
        lambda: found(tmp_path, anew=True),
    ):
        with ProbeResults(tmp_path, "new", HEAD, anew=True) as results:
            results.add(ANN)
        assert found(tmp_path) == {ANN.address: ANN}
        assert ask() == {}
    with ProbeResults(tmp_path, "new", HEAD) as results:
        results.add(ANN)
        results.finish()
    assert found(tmp_path) == {}
    with ProbeResults(tmp_path, "new", HEAD) as results:
        monkeypatch.setattr("relay.cockpit.probe_results.time.time", lambda: 1.0)
        results.add(ANN)
        monkeypatch.undo()
    assert found(tmp_path) == {}
