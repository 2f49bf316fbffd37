"""The Lua scripts of the ledger, which stand in lua/, one in a file."""

from __future__ import annotations

from importlib import resources


def script(name: str) -> str:
    """Return a script without its comments and indentation; its lines keep the numbers that they have in the file.

    It goes whole with every EVAL, and Redis makes a checksum of it each time. What must know all lists has lists.lua in
    its first line, which is a comment in the file.
    """
    lines = _lines(name)
    if any("destinations()" in line for line in lines):
        lines[0] = " ".join(line for line in _lines("lists") if line)
    return "\n".join(lines)


def _lines(name: str) -> list[str]:
    text = resources.files("relay.ledger").joinpath("lua", name + ".lua").read_text(encoding="utf-8")
    return ["" if line.lstrip().startswith("--") else line.strip() for line in text.splitlines()]
