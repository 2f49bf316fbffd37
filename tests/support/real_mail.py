"""Mail that people and programs have really sent, from the test suites of other programs that handle mail.

None of it is here: it is read from installed packages (CPython's tests, flufl.bounce's) and from a package of Debian's
that is fetched. What is in a file with LF is given with CRLF, as it goes over the wire.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from importlib.metadata import files
from pathlib import Path

from support import debian

_FIELD = re.compile(rb"[!-9;-~]+[ \t]*:")


def real_mails(folder: Path) -> tuple[dict[str, bytes], str]:
    """Return messages by a name for each, and what could not be had; ``folder`` is for what is fetched."""
    found: dict[str, bytes] = {}
    lacking = ""
    for path in (*_of_cpython(), *_of_bounces()):
        found |= _read(f"{path.parent.parent.name}/{path.name}", path)
    try:
        root = debian.unpack_source(folder, "notmuch") / "test" / "corpora"
        for path in sorted(path for path in root.rglob("*") if path.is_file() and path.name != "README"):
            found |= _read(f"notmuch/{path.relative_to(root)}", path)
    except debian.NotThere as error:
        lacking = str(error)
    # The same message in two places counts once.
    return {name: text for text, name in {text: name for name, text in found.items()}.items()}, lacking


def _of_cpython() -> Iterator[Path]:
    """Yield the messages that the email package is tested with: our own Python's, or Debian's libpython3-testsuite."""
    try:
        spec = importlib.util.find_spec("test.test_email.data")
    except ModuleNotFoundError:
        spec = None
    folders = [Path(folder) for folder in (spec.submodule_search_locations if spec is not None else None) or ()]
    for folder in folders or sorted(Path("/usr/lib").glob("python3.*/test/test_email/data"))[:1]:
        yield from sorted(folder.glob("msg_*.txt"))


def _of_bounces() -> Iterator[Path]:
    """Yield the bounces that flufl.bounce is tested with."""
    for file in files("flufl.bounce") or ():
        if file.match("tests/data/*.txt"):
            yield Path(str(file.locate()))


def _read(name: str, path: Path) -> dict[str, bytes]:
    text = path.read_bytes().replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    if text.startswith(b"From "):
        text = text.partition(b"\n")[2]  # a mailbox's line, no part of the message
    if not _FIELD.match(text):
        return {}  # a file about the messages
    return {name: text.replace(b"\n", b"\r\n")}
