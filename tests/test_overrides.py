"""An override in a class of another library takes whatever the method of the base takes: that library calls it."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys
from collections.abc import Iterator
from inspect import Parameter
from typing import Any

import pytest

_BY_PLACE = {Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD}
_BY_NAME = {Parameter.KEYWORD_ONLY, Parameter.POSITIONAL_OR_KEYWORD}
# An attribute that is gone from RQ would be one that nobody asks for any more.
RQ = {
    "DeliveryWorker": {
        *("job_class", "log_result_lifespan", "work", "register_birth", "request_stop"),
        *("connection_timeout", "run_maintenance_tasks", "clean_registries"),
    },
    "DeliveryJob": {"restore", "perform", "_execute"},
    "Scheduler": {"enqueue_scheduled_jobs"},
}


def _classes() -> Iterator[type]:
    for top in ("relay", "workers"):
        for module in pkgutil.walk_packages(importlib.import_module(top).__path__, f"{top}."):
            if not module.name.endswith("__main__"):
                found = vars(importlib.import_module(module.name)).values()
                yield from (kind for kind in found if isinstance(kind, type) and kind.__module__ == module.name)


def _is_foreign(kind: type) -> bool:
    return kind.__module__.partition(".")[0] not in {"relay", "workers", *sys.stdlib_module_names}


def _overrides() -> Iterator[tuple[type, str, Any, Any]]:
    """Yield a class of ours, a name, what it has of this name, and what a base of another library has."""
    for kind in _classes():
        for name, ours in vars(kind).items():
            base = next((vars(base)[name] for base in filter(_is_foreign, kind.__mro__) if name in vars(base)), None)
            if base is not None and not name.startswith("__"):
                yield kind, name, ours, base


OVERRIDES = {f"{kind.__module__}.{kind.__qualname__}.{name}": (ours, base) for kind, name, ours, base in _overrides()}


def lacking(ours: Any, base: Any) -> list[str]:
    """Say what can be given to ``base`` and not to ``ours``."""
    if isinstance(base, property | classmethod | staticmethod) and type(ours) is not type(base):
        return [f"it is a {type(base).__name__}"]
    ours, base = (getattr(method, "__func__", method) for method in (ours, base))
    if not callable(base):
        return []
    if inspect.iscoroutinefunction(base) != inspect.iscoroutinefunction(ours):
        return ["one of them is a coroutine function"]
    wanted, given = (list(inspect.signature(method).parameters.values())[1:] for method in (base, ours))
    kinds = {each.kind for each in given}
    places = [each for each in given if each.kind in _BY_PLACE]
    names = {each.name: each for each in given if each.kind in _BY_NAME}
    found = []
    for place, each in enumerate(wanted):
        by_place = places[place] if place < len(places) else None
        by_name = names.get(each.name)
        if (each.kind in _BY_PLACE and not by_place) or each.kind is Parameter.VAR_POSITIONAL:
            found += [] if Parameter.VAR_POSITIONAL in kinds else [f"{each.name} at its place"]
        if (each.kind in _BY_NAME and not by_name) or each.kind is Parameter.VAR_KEYWORD:
            found += [] if Parameter.VAR_KEYWORD in kinds else [f"{each.name} by its name"]
        if each.default is not Parameter.empty and _is_needed(by_name or by_place):
            found.append(f"{each.name} left out")
    more = [each for each in given if each not in places[: len(wanted)] and each.name not in {w.name for w in wanted}]
    return found + [f"{each.name} is asked for" for each in more if _is_needed(each)]


def _is_needed(each: Parameter | None) -> bool:
    return each is not None and each.default is Parameter.empty and each.kind in _BY_PLACE | _BY_NAME


@pytest.mark.parametrize("name", sorted(OVERRIDES))
def test_an_override_takes_what_the_base_takes(name: str) -> None:
    """The library calls it as it calls its own."""
    assert lacking(*OVERRIDES[name]) == []


def test_what_overrides_rq() -> None:
    """The RQ that is installed has each of these, and nothing else of ours has a name of RQ's by chance."""
    found: dict[str, set[str]] = {}
    for kind, name, _, _ in _overrides():
        if kind.__module__.startswith("workers.rqworker."):
            found.setdefault(kind.__name__, set()).add(name)
    assert found == RQ


class _Base:
    def method(self, one: int, two: int = 2, *, three: int = 3) -> None: ...


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (lambda self, one, two=2, *, three=3: None, []),
        (lambda self, *args, **rest: None, []),
        (lambda self, one, two=2, four=4, *, three=3: None, []),
        (lambda self, one, *, three=3: None, ["two at its place", "two by its name"]),
        (lambda self, one, two=2: None, ["three by its name"]),
        (lambda self, one, second=2, *, three=3: None, ["two by its name"]),
        (lambda self, one, two, *, three=3: None, ["two left out"]),
        (lambda self, one, two=2, *, three=3, four: None, ["four is asked for"]),
        (lambda self, one, two=2, *, three: None, ["three left out"]),
        (property(lambda self: None), []),
    ],
)
def test_what_an_override_lacks_is_found(method: Any, expected: list[str]) -> None:
    """The check itself."""
    assert lacking(method, property(len) if isinstance(method, property) else _Base.method) == expected
