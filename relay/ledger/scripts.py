"""The Lua scripts of the ledger, one file each in lua/, all read at the import: a package may be replaced meanwhile."""

from __future__ import annotations

import functools
from importlib import resources

_FILES = {
    file.name.removesuffix(".lua"): file.read_text(encoding="utf-8").splitlines()
    for file in resources.files("relay.ledger").joinpath("lua").iterdir()
}
_PARTS = {  # a function, and its file
    "clock": "clock",
    "destinations": "lists",
    "turned": "occurrences",
    "joined": "joined",
    "cover_twins": "cover_twins",
}


@functools.cache
def script(name: str, without: str = "") -> str:
    """Return a script without comments and indentation; its lines keep their numbers in the file.

    It is sent whole with every EVAL, and Redis hashes it each time, so it must be short; by EVALSHA a release of eight
    would take it an eighth less, which is one in a hundred of what a message costs it. Functions of other files that
    the script calls are put in its first line, a comment in the file; the function named by ``without`` is false.
    """
    lines = _lines(name)
    front: list[str] = []
    for function, part in _PARTS.items():
        if function == without:
            front.append(f"local {function} = false")
        elif any(f"{function}(" in line for line in lines):
            front += [line for line in _lines(part) if line]
    lines[0] = " ".join(front)
    return "\n".join(lines)


def _lines(name: str) -> list[str]:
    return ["" if line.lstrip().startswith("--") else line.strip() for line in _FILES[name]]
