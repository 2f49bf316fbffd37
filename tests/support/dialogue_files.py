"""SMTP conversations as text files, read and spoken: the format of tests/smtpd/dialogues, as its README.txt has it."""

from __future__ import annotations

import fnmatch
import re
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from support.dialogue import Dialogue, Unexpected
from support.reactions import Close, Reaction, Reset
from support.recorded_sessions import Connection, Transaction

_STEP = re.compile(r"(C:|C\||S:|S\.\.\.|TLS|END|P:|P!|FROM:|TO:|BODY:|RAW:) ?(.*)")
_WORDS: dict[str, Reaction] = {"close": Close(), "reset": Reset()}


@dataclass
class Script:
    """One file: what it promises, under which settings, with which primary, and the lines that are said."""

    path: Path
    promise: str = ""
    settings: dict[str, str] = field(default_factory=dict)
    offers: tuple[str, ...] | None = None
    replies: dict[str, Reaction] = field(default_factory=dict)
    in_data: tuple[int, Reaction] | None = None
    steps: list[tuple[int, str, str]] = field(default_factory=list)

    @property
    def group(self) -> tuple[object, ...]:
        """Scripts of one group can talk to the same relay."""
        return (tuple(sorted(self.settings.items())), self.offers)


def read(path: Path) -> Script:
    """Read a file. Raises ValueError with the line that means nothing."""
    script = Script(path)
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("#"):
            script.promise += line[1:]
        elif found := re.fullmatch(r"set (\S+) = (.*)", line):
            script.settings[found[1]] = found[2]
        elif found := re.fullmatch(r"offers ?(.*)", line):
            script.offers = tuple(word.strip() for word in found[1].split(",") if word.strip())
        elif found := re.fullmatch(r"primary early (\d+) => (.*)", line):
            script.in_data = (int(found[1]), (_reaction(found[2]), Close()))
        elif found := re.fullmatch(r"primary (.+?) => (.*)", line):
            script.replies[found[1]] = _reaction(found[2])
        elif found := _STEP.fullmatch(line):
            script.steps.append((number, found[1], found[2]))
        elif line.strip():
            raise ValueError(f"{path}:{number}: {line}")
    return script


def _reaction(text: str) -> Reaction:
    if text in _WORDS:
        return _WORDS[text]
    if text.startswith("raw "):
        return _octets(text[4:])
    return _octets(text).decode("utf-8", "surrogateescape")


def _octets(text: str) -> bytes:
    r"""Return what a line stands for: \r \n \t \0 \\ \xHH are escapes, {x*500} is a text so many times."""
    text = re.sub(r"\{([^{}]+?)\*(\d+)\}", lambda found: found[1] * int(found[2]), text)
    data = text.encode("utf-8", "surrogateescape")
    names = {b"r": b"\r", b"n": b"\n", b"t": b"\t", b"0": b"\0", b"\\": b"\\"}
    return re.sub(
        rb"\\(?:x([0-9a-fA-F]{2})|([rnt0\\]))",
        lambda found: bytes.fromhex(found[1].decode()) if found[1] else names[found[2]],
        data,
    )


def speak(
    script: Script,
    connect: Callable[[], Dialogue],
    heard: Callable[[], list[Connection]],
    context: ssl.SSLContext | None,
) -> None:
    """Say the client's lines, compare the server's, and look at what the primary has heard by then."""
    primary = _Primary(heard)
    with connect() as client:
        for number, kind, text in script.steps:
            try:
                if kind in ("P:", "P!", "FROM:", "TO:", "BODY:", "RAW:"):
                    primary.check(kind, text)
                else:
                    _step(client, kind, text, context)
            except (Unexpected, AssertionError) as error:
                raise AssertionError(f"{script.path.name}:{number}: {kind} {text[:300]}\n{error}") from None
    assert primary.told == len(primary.messages), f"the primary took {len(primary.messages)} messages"


def _step(client: Dialogue, kind: str, text: str, context: ssl.SSLContext | None) -> None:
    match kind:
        case "C:":
            client.raw(_octets(text) + b"\r\n")
        case "C|":
            client.raw(_octets(text))
        case "S:":
            _expect(client.line(), text)
        case "S...":
            while (line := client.line()).startswith(f"{text}-"):
                pass
            _expect(line, f"{text} *")
        case "TLS":
            assert context is not None, "no certificate in this group"
            client.sock = context.wrap_socket(client.sock, server_hostname="localhost")
        case "END":
            assert client.is_closed(), "the connection is still open, or something was said"


def _expect(line: str, wanted: str) -> None:
    pattern = wanted.replace("[", "[[]").replace("?", "[?]")
    assert fnmatch.fnmatchcase(line, pattern), f"got {line!r}"


class _Primary:
    """What the primary has heard on the connections of this conversation, looked through in order."""

    def __init__(self, heard: Callable[[], list[Connection]]) -> None:
        self._heard = heard
        self._at = 0  # commands that have been accounted for
        self.told = 0  # messages

    @property
    def messages(self) -> list[Transaction]:
        return [t for connection in self._heard() for t in connection.transactions if t.accepted]

    def check(self, kind: str, text: str) -> None:
        commands = [command for connection in self._heard() for command in connection.commands]
        octets = _octets(text)
        if kind == "P:":
            wanted = octets.decode("utf-8", "surrogateescape")
            assert wanted in commands[self._at :], f"the primary heard {commands[self._at :]}"
            self._at += commands[self._at :].index(wanted) + 1
        elif kind == "P!":
            assert not [c for c in commands if c.upper().startswith(text.upper())], f"the primary heard {commands}"
        else:
            self.told += kind == "FROM:"
            assert len(self.messages) >= self.told, f"the primary took {len(self.messages)} messages"
            message = self.messages[self.told - 1]
            got: dict[str, object] = {
                "FROM:": message.sender,
                "TO:": " ".join(message.recipients),
                "BODY:": message.content,
                "RAW:": message.wire[len(message.trace) :],
            }
            wanted_value: object = octets if kind in ("BODY:", "RAW:") else text
            assert got[kind] == wanted_value, f"got {got[kind]!r}"


__all__ = ["Script", "read", "speak"]
