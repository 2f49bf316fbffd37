"""The ring of events: the last ones of each process, whole or not at all, and never a reason to fail."""

from __future__ import annotations

from relay.event_ring import EventRing


def noted(ring: EventRing, *names: str) -> None:
    for number, name in enumerate(names):
        ring.note(float(number), name, {"id": "x", "reply": "550 no"})


def test_what_is_new_is_told_once_and_in_order() -> None:
    """Of two processes, each in its region."""
    ring, seen = EventRing(4), {}
    ring.take(0)
    noted(ring, "failed", "deferred")
    ring.take(3)
    noted(ring, "refused")
    assert [event for _, event, _ in ring.since(seen, 4)] == ["failed", "refused", "deferred"]
    assert ring.since(seen, 4) == []
    noted(ring, "copy lost")
    assert [(event, fields) for _, event, fields in ring.since(seen, 4)] == [
        ("copy lost", {"id": "x", "reply": "550 no"})
    ]


def test_of_many_the_last_ones_are_left() -> None:
    """What nobody has read in time is written over."""
    ring = EventRing(1)
    ring.take(0)
    noted(ring, *(f"event {n}" for n in range(1000)))
    found = [event for _, event, _ in ring.since({}, 1)]
    assert found == [f"event {n}" for n in range(984, 1000)]


def test_long_and_strange_fields_do_no_harm() -> None:
    """A reply without end is cut, and what still does not fit keeps its id."""
    ring = EventRing(1)
    ring.take(0)
    ring.note(1.0, "failed", {"id": "abc", "reply": "x" * 9999, "at": 3, "none": None, "half": "\udcff"})
    ring.note(2.0, "failed", {"id": "abc", **{f"field {n}": "\U0001f600" * 90 for n in range(9)}})
    ring.note(3.0, "e" * 9999, {})
    first, second = ring.since({}, 1)
    assert (first[2]["id"], len(first[2]["reply"]), first[2]["at"]) == ("abc", 90, 3)
    assert second == (2.0, "failed", {"id": "abc"})


def test_what_is_torn_is_left_out_and_without_a_region_nothing_is_noted() -> None:
    """A slot that is being written over, and a process that has none."""
    ring = EventRing(1)
    noted(ring, "lost")
    ring.take(0)
    noted(ring, "one", "two")
    ring._of(0)[8 + 2 : 8 + 6] = b"\xff\xff\xff\xff"
    assert [event for _, event, _ in ring.since({}, 1)] == ["two"]
    ring.take(None)
    noted(ring, "lost")
    assert [event for _, event, _ in ring.since({}, 1)] == ["two"]
