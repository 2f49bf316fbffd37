"""The syntax of MAIL and RCPT: a path and its ESMTP parameters (RFC 5321 4.1.1, 4.1.2).

Paths and parameters are carried as they came: no case folding, no rewriting of odd local parts. What
does not parse raises SyntaxProblem with the reply to give.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from relay.envelope import Reply, printable

# A quoted local part may hold ">" and spaces; a source route is part of the path.
_PATH = re.compile(r'\s*(?:<((?:"(?:[^"\\]|\\.)*"|[^<>"\s])*)>|([^<>\s]+))(?:\s+(.*?))?\s*$')
_PARAMETER = re.compile(r"([A-Za-z0-9][A-Za-z0-9-]*)(?:=([^\x00-\x20=\x7f][^\x00-\x20\x7f]*))?$")

_SIZE = re.compile(r"[0-9]{1,20}")  # RFC 1870 3

# Which extension carries which parameter. What is not here is answered 555 (RFC 5321 4.1.1.11).
MAIL_EXTENSIONS: Mapping[str, str] = {
    "SIZE": "SIZE",
    "BODY": "8BITMIME",
    "SMTPUTF8": "SMTPUTF8",
    "RET": "DSN",
    "ENVID": "DSN",
    "AUTH": "AUTH",
    "REQUIRETLS": "REQUIRETLS",
    "MT-PRIORITY": "MT-PRIORITY",
    "HOLDFOR": "FUTURERELEASE",
    "HOLDUNTIL": "FUTURERELEASE",
}
RCPT_EXTENSIONS: Mapping[str, str] = {"NOTIFY": "DSN", "ORCPT": "DSN"}


class SyntaxProblem(ValueError):
    """A command that cannot be read; ``reply`` is what to answer."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.reply = Reply.of(code, text)


def parse_path(argument: str | None, keyword: str) -> tuple[str, tuple[str, ...]]:
    """Read ``FROM:<path> parameters`` or ``TO:<path> parameters``. Raises SyntaxProblem.

    Returns the path without angle brackets ("" for the null sender) and the parameters as they came.
    """
    syntax = f"5.5.4 Syntax: {'MAIL' if keyword == 'FROM' else 'RCPT'} {keyword}:<address>"
    if argument is None or argument[: len(keyword) + 1].upper() != keyword + ":":
        raise SyntaxProblem(501, syntax)
    found = _PATH.match(argument, len(keyword) + 1)
    if not found:
        raise SyntaxProblem(501, syntax)
    quoted, bare, rest = found.groups()
    parameters = tuple(rest.split()) if rest else ()
    for parameter in parameters:
        if not _PARAMETER.match(parameter):
            raise SyntaxProblem(501, "5.5.4 Malformed parameter")
    names = [p.partition("=")[0].upper() for p in parameters]
    if len(set(names)) != len(names):
        raise SyntaxProblem(501, "5.5.4 Repeated parameter")
    return (quoted if quoted is not None else bare), parameters


# What is announced with the primary's own parameters, where it announces it.
_PASSED_ON = ("8BITMIME", "SMTPUTF8", "DSN", "CHUNKING", "MT-PRIORITY", "FUTURERELEASE")


def offers(
    announced: Mapping[str, str], size_limit: int, *, tls: bool = False, verified: bool = False
) -> tuple[tuple[str, ...], frozenset[str]]:
    """Return our EHLO lines and the extensions whose parameters we take: what we carry of what the primary announces.

    PIPELINING and ENHANCEDSTATUSCODES are ours. SIZE is the smaller limit; 0 and no number mean none. REQUIRETLS takes
    TLS on both sides, and a primary whose certificate is verified (RFC 8689 4.2.1). AUTH is the parameter of MAIL.
    """
    limits = [n for n in (size_limit, _number(announced.get("SIZE", ""))) if n]
    lines = ["PIPELINING", f"SIZE {min(limits)}" if limits else "SIZE"]
    for name in _PASSED_ON:
        if name in announced:
            # Only these two have parameters; a server that gives others some is not taken at its word.
            parameters = printable(announced[name]) if name in ("MT-PRIORITY", "FUTURERELEASE") else ""
            lines.append(f"{name} {parameters}".rstrip())
    if "REQUIRETLS" in announced and tls and verified:
        lines.append("REQUIRETLS")
    lines.append("ENHANCEDSTATUSCODES")
    keywords = {line.partition(" ")[0] for line in lines}
    return tuple(lines), frozenset(keywords | ({"AUTH"} & set(announced)))


def _number(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() else 0


def refuse_unknown(parameters: Iterable[str], extensions: Mapping[str, str], offered: Collection[str]) -> None:
    """Raise SyntaxProblem for a parameter whose extension was not offered (RFC 5321 4.1.1.11)."""
    for parameter in parameters:
        name = parameter.partition("=")[0].upper()
        if extensions.get(name, "") not in offered:
            if name == "REQUIRETLS":
                raise SyntaxProblem(550, "5.7.30 REQUIRETLS support required")  # RFC 8689 4.1
            raise SyntaxProblem(555, f"5.5.4 Parameter {name[:32]} not recognized or not offered")


def carried(parameters: Iterable[str], extensions: Mapping[str, str], available: Mapping[str, str]) -> list[str]:
    """Return the parameters as this connection can take them.

    SIZE, BODY=7BIT and AUTH (RFC 4954 5) say nothing that a server without the extension needs. Anything else that
    it cannot take is never dropped: raises SyntaxProblem, temporary, since another node may be able to.
    """
    result = []
    for parameter in parameters:
        name, _, text = parameter.partition("=")
        if extensions[name.upper()] in available:
            result.append(parameter)
        elif name.upper() not in ("SIZE", "AUTH") and text.upper() != "7BIT":
            raise SyntaxProblem(451, f"4.3.0 The primary server does not take {name.upper()} at the moment")
    return result


def parse_chunk(argument: str) -> tuple[int, bool]:
    """Read ``size [LAST]`` of BDAT (RFC 3030 2). Raises SyntaxProblem."""
    words = argument.split()
    is_last = len(words) == 2 and words[1].upper() == "LAST"
    if not words or len(words) > 1 + is_last or not _SIZE.fullmatch(words[0]):
        raise SyntaxProblem(501, "5.5.4 Syntax: BDAT size [LAST]")
    return int(words[0]), is_last


def declared_size(parameters: Iterable[str]) -> int:
    """Return the SIZE of a MAIL command, 0 without one. Raises SyntaxProblem."""
    text = value(parameters, "SIZE")
    if text is not None and not _SIZE.fullmatch(text):
        raise SyntaxProblem(501, "5.5.4 SIZE must be a number")
    return int(text or 0)


def value(parameters: Iterable[str], name: str) -> str | None:
    """Return the value of a parameter, "" when it has none, None when it is absent."""
    for parameter in parameters:
        key, _, text = parameter.partition("=")
        if key.upper() == name:
            return text
    return None
