"""Loads the Lua scripts of the ledger, one file each in lua/."""

from __future__ import annotations

from importlib import resources

_PARTS = {"destinations": "lists", "turned": "occurrences", "joined": "joined"}  # a function, and its file


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
    text = resources.files("relay.ledger").joinpath("lua", name + ".lua").read_text(encoding="utf-8")
    return ["" if line.lstrip().startswith("--") else line.strip() for line in text.splitlines()]
