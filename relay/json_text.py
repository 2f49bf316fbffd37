"""What is said to programs as JSON: strictly, so that nothing stands in it as Python writes it.

A set is a sorted list, and a number that JSON does not have (what Redis holds may be anything) is null. A value of
another type is an error of ours, which raises TypeError: its text would be no form that a program can rely on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def json_text(value: Any, *, indent: int | None = None) -> str:
    """Return a value as JSON (RFC 8259). Raises TypeError for what has no form there."""
    try:
        return json.dumps(value, default=_plain, allow_nan=False, indent=indent)
    except ValueError:  # a NaN or an infinity: seldom, so that all is gone through only then
        return json.dumps(_finite(value), default=_plain, allow_nan=False, indent=indent)


def _plain(value: Any) -> Any:
    if isinstance(value, frozenset | set):
        return sorted(value)
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"a {type(value).__name__} has no form in JSON")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple | frozenset | set):
        return [_finite(one) for one in (sorted(value) if isinstance(value, frozenset | set) else value)]
    return value
