"""The recipients that the trace remembers: whom the primary took, each once, and whom it refused as unknown."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from relay.config.model import TraceSettings
from relay.mail.reply import Reply
from relay.trace import events, recipients
from relay.trace.lookup import Reader, Unseen
from relay.trace.recipients import SeenRecipients
from support.traced import Traced, delivered

UNKNOWN = Reply.of(550, "5.1.1 User unknown")


@pytest.fixture
def traced(tmp_path: Path) -> Iterator[Traced]:
    found = Traced(tmp_path)
    yield found
    found.close()


def seen(traced: Traced, since: float = 0.0) -> SeenRecipients:
    found, unseen = SeenRecipients(), Unseen()
    with Reader(traced.folder, unseen) as reader:
        for event in reader.received(since):
            found.take(event)
    assert not unseen.damaged
    return found


def test_who_was_taken_and_who_is_unknown(traced: Traced) -> None:
    """The newest first; of refused messages nobody was taken, and a refusal of ours or for another reason is none."""
    first = traced.received(recipients=["old@b.example"])
    traced.write(first, delivered(first[1]))
    traced.now += 3600
    refused = [
        ("gone@b.example", UNKNOWN, False),
        ("own@b.example", UNKNOWN, True),
        ("policy@b.example", Reply.of(550, "5.7.1 not from you"), False),
        ("later@b.example", Reply.of(450, "4.2.0 greylisted"), False),
    ]
    many = traced.received(recipients=["bob@b.example", "eve@b.example"], refused=refused)
    many[21] = 3  # recipients, of whom one is in a further event
    further = [events.MORE, many[1], 0, ["last@b.example"]]
    traced.write(many, further, traced.received(recipients=["no@b.example"], outcome=events.REFUSED))
    found = seen(traced)
    assert list(found.accepted) == ["bob@b.example", "eve@b.example", "last@b.example", "old@b.example"]
    assert list(found.refused) == ["gone@b.example"]
    assert "old@b.example" not in seen(traced, traced.now - 60).accepted


def test_it_is_bounded_and_the_newest_win(traced: Traced, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are."""
    monkeypatch.setattr(recipients, "MOST_ACCEPTED", 2)
    for n in range(4):
        traced.now += 1
        traced.write(traced.received(recipients=[f"u{n}@b.example", "bob@b.example"]))
    found = seen(traced)
    assert (list(found.accepted), found.is_cut) == (["u3@b.example", "bob@b.example"], True)


@pytest.mark.parametrize("mode", ["hashed", "off"])
def test_addresses_that_are_not_kept(tmp_path: Path, mode: str) -> None:
    """A pseudonym is nobody's address; it is counted."""
    traced = Traced(tmp_path, TraceSettings(addresses=mode))
    traced.write(traced.received(refused=[("gone@b.example", UNKNOWN, False)]))
    found = seen(traced)
    traced.close()
    assert (list(found.accepted), found.hashed) == ([], 2 if mode == "hashed" else 0)
    assert "gone@b.example" not in found.refused
