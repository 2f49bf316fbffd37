"""The syntax of command lines, above all of MAIL and RCPT: a path and its ESMTP parameters (RFC 5321 4.1.1, 4.1.2).

Paths and parameters are passed on unchanged: no case folding, no rewriting of odd local parts. White space is accepted
where Postfix and Exim accept it (around a command, tabs between words, within the brackets of a path), and is not
passed on. A line that does not parse raises SyntaxProblem with the reply to give.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache

from relay.mail.esmtp import value
from relay.mail.reply import Reply
from relay.mail.text import printable

# A quoted local part may hold ">" and spaces; a source route is part of the path.
_PATH = re.compile(r' *(?:< *((?:"(?:[^"\\]|\\.)*"|[^<>" ]++)*) *>|((?:"(?:[^"\\]|\\.)*"|[^<>" ]++)+))(?: +(.*))?$')
_PARAMETER = re.compile(r"([A-Za-z0-9][A-Za-z0-9-]*)(?:=([^\x00-\x20=\x7f][^\x00-\x20\x7f]*))?$")

_BLANKS = b" \t"
LINE_LIMIT = 4096  # octets of a command line; RFC 5321 4.5.3.1.4 with room for ORCPT and ENVID
# Matches a command line as nearly all are: verb and argument in printable ASCII, with nothing to strip or to mend.
as_ordinary = re.compile(rb"([A-Za-z]++)(?: ([!-~][ -~]*+)(?<! ))?\r\n").fullmatch
_CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_QUOTED = re.compile(rb'"(?:[^"\\]|\\.)*"')
_NO_ORIGINAL = re.compile(r"ORCPT=[^;]+;", re.IGNORECASE)
_SIZE = re.compile(r"[0-9]{1,20}")  # RFC 1870 3
_CHUNK = re.compile(r" *([0-9]{1,20})(?: +(LAST))? *", re.IGNORECASE | re.ASCII)
_WORD = re.IGNORECASE | re.ASCII  # without ASCII, the letter long s would match S

# The form of each value; "" means no value. Everything else, above all xtext, is left to the primary: programs get it
# wrong, and mail that the primary accepts directly must not fail at the relay.
_VALUES: Mapping[str, re.Pattern[str]] = {
    "SIZE": _SIZE,
    "BODY": re.compile("7BIT|8BITMIME", _WORD),  # RFC 6152 2; BINARYMIME is not offered
    "SMTPUTF8": re.compile(""),  # RFC 6531 3.4
    "REQUIRETLS": re.compile(""),  # RFC 8689 2
    "RET": re.compile("FULL|HDRS", _WORD),  # RFC 3461 4.3
    "ENVID": re.compile(".+"),
    "NOTIFY": re.compile("NEVER|(?:SUCCESS|FAILURE|DELAY)(?:,(?:SUCCESS|FAILURE|DELAY)){0,2}", _WORD),  # 4.1
    "ORCPT": re.compile("[^;]+;.*"),  # 4.2; some clients send it without an address
    "AUTH": re.compile(".+"),
    "MT-PRIORITY": re.compile("0|-?[1-9]"),  # RFC 6710 4.2
    "HOLDFOR": re.compile("[1-9][0-9]{0,8}"),  # RFC 4865 4.2
    "HOLDUNTIL": re.compile("[0-9]{4}-.+"),
}


class SyntaxProblem(ValueError):
    """A command that cannot be parsed; ``reply`` is the reply to it."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.reply = Reply.of(code, text)


def split_command(line: bytes) -> tuple[bytes, bytes]:
    """Return the verb of a command line in capitals, and its argument without the blanks and tabs around it."""
    if (ordinary := as_ordinary(line)) is not None:
        verb, argument = ordinary.groups(b"")
        return verb.upper(), argument
    text = line.rstrip(b"\r\n").strip(_BLANKS)
    verb, _, argument = text.partition(b" ")
    if b"\t" in verb:
        verb, _, argument = text.partition(b"\t")
    return verb.upper(), argument.lstrip(_BLANKS)


def argument_text(argument: bytes) -> str:
    """Decode an argument: tabs become blanks, invalid UTF-8 becomes surrogates. Raises SyntaxProblem."""
    text = argument.decode("utf-8", "surrogateescape")
    if text.isprintable():
        return text
    if _CONTROL.search(argument) or any(b"\t" in quoted for quoted in _QUOTED.findall(argument)):
        raise SyntaxProblem(501, "5.5.2 Control character in a command")
    return text.replace("\t", " ")


def parse_path(argument: str | None, keyword: str) -> tuple[str, tuple[str, ...]]:
    """Read ``FROM:<path> parameters`` or ``TO:<path> parameters``. Raises SyntaxProblem.

    Returns the path without angle brackets ("" for the null sender) and the parameters as they came.
    """
    colon = len(keyword)
    found = None
    if argument is not None and argument[colon : colon + 1] == ":" and argument[:colon].upper() == keyword:
        found = _PATH.match(argument, colon + 1)
    if not found:
        verb = "MAIL" if keyword == "FROM" else "RCPT"
        raise SyntaxProblem(501, f"5.5.4 Syntax: {verb} {keyword}:<address>")
    quoted, bare, rest = found.groups()
    path = quoted if quoted is not None else bare
    if not rest:
        return path, ()
    parameters = tuple([word for word in rest.split(" ") if word])
    for parameter in parameters:
        if not _PARAMETER.match(parameter):
            raise SyntaxProblem(501, "5.5.4 Malformed parameter")
    names = [p.partition("=")[0].upper() for p in parameters]
    if len(set(names)) != len(names):
        raise SyntaxProblem(501, "5.5.4 Repeated parameter")
    return path, parameters


# Extensions that are announced with the primary's own parameters.
_PASSED_ON = ("8BITMIME", "SMTPUTF8", "DSN", "CHUNKING", "MT-PRIORITY", "FUTURERELEASE")


@lru_cache(maxsize=64)  # servers say the same to each connection
def offers(
    announced: tuple[tuple[str, str], ...], size_limit: int, *, tls: bool = False
) -> tuple[tuple[str, ...], frozenset[str]]:
    """Return the EHLO lines, and the extensions whose parameters are accepted: those of the primary that we can carry.

    PIPELINING and ENHANCEDSTATUSCODES are our own. SIZE is the smaller limit; 0 or no number means none. REQUIRETLS
    needs TLS with the client, too (RFC 8689 4.2.1). AUTH means the MAIL parameter.
    """
    by_name = dict(announced)
    limits = [n for n in (size_limit, _number(by_name.get("SIZE", ""))) if n]
    lines = ["PIPELINING", f"SIZE {min(limits)}" if limits else "SIZE"]
    for name in _PASSED_ON:
        if name in by_name:
            # Only these two have parameters; those that a server gives to others are ignored.
            parameters = printable(by_name[name]) if name in ("MT-PRIORITY", "FUTURERELEASE") else ""
            lines.append(f"{name} {parameters}".rstrip())
    if "REQUIRETLS" in by_name and tls:
        lines.append("REQUIRETLS")
    lines.append("ENHANCEDSTATUSCODES")
    keywords = {line.partition(" ")[0] for line in lines}
    return tuple(lines), frozenset(keywords | ({"AUTH"} & by_name.keys()))


def _number(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() else 0


def check(parameters: Collection[str], extensions: Mapping[str, str], offered: Collection[str]) -> None:
    """Raise SyntaxProblem for a parameter that was not offered (RFC 5321 4.1.1.11) or has an invalid value."""
    for parameter in parameters:
        name, _, text = parameter.partition("=")
        name = name.upper()
        if extensions.get(name, "") not in offered:
            if name == "REQUIRETLS":
                raise SyntaxProblem(550, "5.7.30 REQUIRETLS support required")  # RFC 8689 4.1
            raise SyntaxProblem(555, f"5.5.4 Parameter {name[:32]} not recognized or not offered")
        if not _VALUES[name].fullmatch(text):
            raise SyntaxProblem(501, f"5.5.4 Bad value of {name}")
    if value(parameters, "HOLDFOR") is not None and value(parameters, "HOLDUNTIL") is not None:
        raise SyntaxProblem(501, "5.5.4 HOLDFOR or HOLDUNTIL, not both")  # RFC 4865 5


def meaningful(parameters: tuple[str, ...]) -> tuple[str, ...]:
    """Return the RCPT parameters without an ORCPT that has no address, which some servers refuse."""
    if any(map(_NO_ORIGINAL.fullmatch, parameters)):
        return tuple(parameter for parameter in parameters if not _NO_ORIGINAL.fullmatch(parameter))
    return parameters


def carried(parameters: Iterable[str], extensions: Mapping[str, str], available: Mapping[str, str]) -> list[str]:
    """Return the parameters that a server with these extensions accepts.

    SIZE, BODY=7BIT and AUTH (RFC 4954 5) are dropped for a server without the extension. Any other parameter that it
    lacks raises SyntaxProblem with a temporary reply, since another node may accept it.
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
    """Read ``size [LAST]`` of BDAT (RFC 3030 2): octets, and whether it is the last. Raises SyntaxProblem."""
    found = _CHUNK.fullmatch(argument)
    if not found:
        raise SyntaxProblem(501, "5.5.4 Syntax: BDAT size [LAST]")
    return int(found[1]), found[2] is not None


def nothing_after(verb: str, argument: str) -> None:
    """Raise SyntaxProblem if a command that takes no argument has one."""
    if argument:
        raise SyntaxProblem(501, f"5.5.4 Syntax: {verb}")


def declared_size(parameters: Iterable[str]) -> int:
    """Return the SIZE parameter of a MAIL command in octets, 0 without one."""
    return int(value(parameters, "SIZE") or 0)
