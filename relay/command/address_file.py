"""A file of addresses that a command is given, or standard input: text in UTF-8, of a size that is meant."""

from __future__ import annotations

import sys
from pathlib import Path

from relay.command.exit_status import Misuse

_LARGEST = 256 << 20  # octets


def read(file: str) -> str:
    """Return the text of a file, "-" for standard input. Raises Misuse."""
    try:
        if file == "-":
            data = sys.stdin.buffer.read(_LARGEST + 1)
        else:
            with Path(file).open("rb") as opened:
                data = opened.read(_LARGEST + 1)
    except OSError as error:
        raise Misuse(f"{file}: {error.strerror}") from error
    if len(data) > _LARGEST:
        raise Misuse(f"{file}: it is larger than {_LARGEST >> 20} MB")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise Misuse(f"{file}: line {line}: no UTF-8") from None
