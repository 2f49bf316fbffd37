"""The types of settings: how a duration, a size, a list of networks or a URL is read and shown.

A type reads the value from a file, a variable or a flag (variables and flags give text, a file also numbers and lists)
and raises ValueError with what was expected, never with a secret in the text.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from relay.mail.addresses import Network
from relay.mail.text import printable

_DURATION_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
_SIZE_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_DOMAIN = re.compile(r"[^\s@,<>()\[\]:;\\\"/]+")
_HOST = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9._-]*[A-Za-z0-9_])?\.?")


def quoted(value: object) -> str:
    """Return a value for an error message: printable, at most 80 characters, without user information."""
    text = mask(str(value).lower() if isinstance(value, bool) else str(value))
    return f'"{printable(text if len(text) <= 80 else text[:77] + "...")}"'


def mask(text: str) -> str:
    """Return text with the secrets of every URL in it replaced by ``***``.

    Everything before the last @ counts as user information, even where a strict parser would disagree: a password
    with an unescaped / or # must not show either.
    """
    scheme, mark, rest = text.partition("://")
    if not mark:
        scheme, rest = "", text
    userinfo, at, host = rest.rpartition("@")
    if at:
        user, colon, _ = userinfo.partition(":")
        # In a Redis URL, a single word before the @ is usually the password.
        shown = f"{user}:***" if colon else "***" if scheme.startswith("redis") else user
        rest = f"{shown}@{host}"
    return re.sub(r"([?&]password=)[^&]*", r"\1***", f"{scheme}{mark}{rest}")


# What a value may be ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OptionType:
    """How values of one type are read and shown."""

    expected: str
    read: Callable[[Any], Any]
    show: Callable[[Any], str] = str
    words: tuple[str, ...] = ()  # all possible values, if they are few
    several: bool = False  # a list: a repeated flag adds values


def _fail(expected: str, value: object) -> ValueError:
    return ValueError(f"expected {expected}, not {quoted(value)}")


def _text_of(value: object, expected: str) -> str:
    if not isinstance(value, str):
        raise _fail(expected, value)
    return value.strip()


def _items_of(value: object, expected: str) -> list[str]:
    """Read a list from a file, or its comma-separated form; blanks and stray commas are ignored."""
    parts = value if isinstance(value, list | tuple) else _text_of(value, expected).split(",")
    return [text for part in parts if (text := _text_of(part, expected))]


def _number(value: object, units: dict[str, int], expected: str) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]?)", _text_of(value, expected).lower())
    if match is None or match[2] not in units:
        raise _fail(expected, value)
    return float(match[1]) * units[match[2]]


def _shown_in_units(value: float, units: dict[str, int]) -> str:
    for unit, factor in sorted(units.items(), key=lambda u: -u[1]):
        if unit and factor > 1 and value and value % factor == 0:
            return f"{value / factor:.0f}{unit.upper() if units is _SIZE_UNITS else unit}"
    return f"{value:g}" if value % 1 else f"{value:.0f}"


def duration(*, zero: bool = False) -> OptionType:
    """Return the type of a duration: seconds as float."""
    expected = "a duration such as 30, 90s, 5m, 1h or 5d" + ("" if zero else ", more than 0")

    def read(value: object) -> float:
        seconds = _number(value, _DURATION_UNITS, expected)
        if not (0 < seconds < float("inf") or (zero and seconds == 0)):
            raise _fail(expected, value)
        return seconds

    return OptionType(expected, read, lambda v: _shown_in_units(v, _DURATION_UNITS))


def size() -> OptionType:
    """Return the type of a size in bytes."""
    expected = "a size in bytes such as 1024, 64K, 10M or 1G"

    def read(value: object) -> int:
        count = _number(value, _SIZE_UNITS, expected)
        if count < 0 or count != count // 1:
            raise _fail(expected, value)
        return int(count)

    return OptionType(expected, read, lambda v: _shown_in_units(v, _SIZE_UNITS))


def integer(least: int = 0, most: int = 1_000_000) -> OptionType:
    """Return the type of a whole number within limits."""
    expected = f"a whole number from {least} to {most}"

    def read(value: object) -> int:
        if isinstance(value, str) and re.fullmatch(r"\s*\d{1,12}\s*", value):
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise _fail(expected, value)
        return value

    return OptionType(expected, read)


def _read_boolean(value: object) -> bool:
    words = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    word = str(value).strip().lower()
    if isinstance(value, bool | int | str) and word in words:
        return words[word]
    raise _fail("true or false", value)


def choice(*words: str, **synonyms: str) -> OptionType:
    """Return the type of one of these words, in any case; ``synonyms`` maps further words to them."""
    expected = " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 2 else words)

    def read(value: object) -> str:
        word = _text_of(value, expected).lower()
        word = synonyms.get(word, word)
        if word not in words:
            raise _fail(expected, value)
        return word

    return OptionType(expected, read, words=words)


def _read_networks(value: object, *, none: bool = False) -> tuple[Network, ...]:
    expected = "networks such as 10.0.0.0/8 or 2001:db8::/32"
    networks, wrong = [], []
    for item in _items_of(value, expected):
        try:
            networks.append(ipaddress.ip_network(item))
        except ValueError as error:
            # A common mistake is 10.1.2.3/8.
            wrong.append(quoted(item) + (" (it has host bits set)" if "host bits" in str(error) else ""))
    if wrong:
        raise ValueError(f"expected {expected}, not {', '.join(wrong)}")
    if not networks and not none:
        raise ValueError("expected at least one network (0.0.0.0/0 and ::/0 are everybody)")
    return tuple(networks)


def _read_domains(value: object) -> tuple[str, ...]:
    expected = "domains such as example.com"
    domains = _items_of(value, expected)
    if wrong := [quoted(item) for item in domains if not _DOMAIN.fullmatch(item)]:
        raise ValueError(f"expected {expected}, not {', '.join(wrong)}")
    return tuple(item.lower() for item in domains)


def split_host_port(text: str, default_port: int | None = None) -> tuple[str, int]:
    """Return host (without brackets) and port of ``host:port``, ``[v6]:port`` or ``:port`` (the host is then "").

    Raises ValueError without repeating the text, which may hold a secret.
    """
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\[\]:]*))(?::([0-9]{1,5}))?", text)
    if match is None:
        raise ValueError("expected host:port (an IPv6 address in brackets: [2001:db8::1]:25)")
    host, port = match[1] or match[2] or "", match[3]
    if match[1]:
        try:
            ipaddress.IPv6Address(host)
        except ValueError:
            raise ValueError("expected an IPv6 address within the brackets") from None
    elif host and not _HOST.fullmatch(host):
        raise ValueError("expected a host name of letters, digits, dots and hyphens, or an address")
    if port is None and default_port is None:
        raise ValueError("expected host:port, the port is missing")
    number = int(port) if port is not None else default_port or 0
    if number > 65535:
        raise ValueError("expected a port from 0 to 65535")
    return host, number


def _read_dns_server(value: object) -> str:
    expected = "the address of a DNS server, such as 10.0.0.53 or [2001:db8::53]:5353"
    text = _text_of(value, expected)
    try:
        host, port = split_host_port(f"[{text}]" if text.count(":") > 1 and "[" not in text else text, 53)
        address = ipaddress.ip_address(host)
    except ValueError:
        raise _fail(expected, value) from None
    return f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"


def listen_addresses(text: str) -> tuple[tuple[str, int], ...]:
    """Return (host, port) of each listening address in a text; the host "" means all interfaces."""
    return tuple(split_host_port(part.strip()) for part in text.split(",") if part.strip())


def listening(*, may_be_off: bool, several: bool = True) -> OptionType:
    """Return the type of one or more listening addresses; "" means off, if allowed."""
    expected = "host:port, :port (all interfaces) or [IPv6]:port" + (', or "off"' if may_be_off else "")

    def read(value: object) -> str:
        text = ",".join(_items_of(value, expected))
        if may_be_off and text.lower() in {"", "off", "none"}:
            return ""
        try:
            addresses = listen_addresses(text)
        except ValueError:
            addresses = ()
        if not addresses or (len(addresses) > 1 and not several):
            raise _fail(expected, value)
        return text

    return OptionType(expected, read, lambda v: v or "off")


def _read_host_name(value: object) -> str:
    expected = "a host name such as mx.example.com, or an address literal such as [192.0.2.1]"
    text = _text_of(value, expected)
    if _HOST.fullmatch(text) or re.fullmatch(r"\[[0-9A-Fa-f:.]+\]|\[IPv6:[0-9A-Fa-f:.]+\]", text):
        return text
    raise _fail(expected, value)


def _read_path(value: object) -> Path | None:
    """Return an absolute path, or None for no path."""
    text = _text_of(value, "a path")
    if text.lower() in {"", "none", "off"}:
        return None
    try:
        return Path(text).expanduser().absolute()
    except RuntimeError:
        raise ValueError(f"expected a path, and {quoted(text)} names a home folder that is not known") from None


def _parse_url(text: str) -> dict[str, Any]:
    from redis.connection import parse_url  # noqa: PLC0415  (0.1 s, also of commands that need no Redis)

    found: dict[str, Any] = parse_url(text)
    return found


def _read_redis_url(value: object) -> str:
    expected = "redis://[:password@]host:6379/0, rediss://... or unix:///path/of/socket"
    text = _text_of(value, expected)
    if not text:
        return text
    try:
        path: str = _parse_url(text).get("path", "")
    except ValueError:
        raise ValueError(f"expected {expected}") from None  # redis-py's own text may repeat the URL
    if text.startswith("unix://") and not path:
        raise ValueError(f"expected {expected}")
    return text


def sentinel_url(text: str) -> str:
    """Return the URL of a Sentinel given as host:port, host or URL. Raises ValueError without the text."""
    scheme, mark, rest = text.partition("://")
    if not mark:
        scheme, rest = "redis", text
    if scheme not in {"redis", "rediss"}:
        raise ValueError("expected redis:// or rediss://")
    userinfo, at, place = rest.rpartition("@")
    address, slash, options = re.fullmatch(r"([^/?]*)([/?]?)(.*)", place, re.DOTALL).groups()  # type: ignore[union-attr]  # matches all
    host, port = split_host_port(address, 26379)
    if not host:
        raise ValueError("expected a host")
    host = f"[{host}]" if ":" in host else host
    url = f"{scheme}://{userinfo}{at}{host}:{port}{slash}{options}"
    _parse_url(url)
    return url


def _read_sentinels(value: object) -> tuple[str, ...]:
    expected = "Sentinels, each host:26379 or redis(s)://[user:password@]host:26379"
    found = tuple(_items_of(value, expected))
    for text in found:
        try:
            sentinel_url(text)
        except ValueError:
            raise ValueError(f"expected {expected}, not {quoted(text)}") from None
    return found


class Demoted(NamedTuple):
    """How a former primary gets its copies, where no [[backup]] of its name says otherwise."""

    sender: str
    soft_bounce: bool


def _read_demoted(value: object) -> Demoted:
    """Read it as a table, or from ``sender=null, soft_bounce=false``; what is left out stands at its default."""
    expected = 'sender = "null" or "keep" and soft_bounce = true or false'
    if isinstance(value, Demoted):
        return value
    pairs = (item.partition("=") for item in _items_of(value, expected)) if isinstance(value, str) else ()
    given = dict(value) if isinstance(value, Mapping) else {name.strip(): text.strip() for name, _, text in pairs}
    if not isinstance(value, Mapping | str) or not given.keys() <= set(Demoted._fields):
        raise _fail(expected, value)
    sender, soft_bounce = given.get("sender", "null"), given.get("soft_bounce", False)
    return Demoted(choice("keep", "null").read(sender), _read_boolean(soft_bounce))


def _show_demoted(value: Demoted) -> str:
    return f"sender={value.sender}, soft_bounce={BOOLEAN.show(value.soft_bounce)}"


class PageHost(NamedTuple):
    """A name under which browsers reach the page; ``is_tls`` where what is in front speaks TLS.

    ``port`` is only for links to it; 0: the usual one behind TLS, else that of status.listen.
    """

    name: str
    is_tls: bool
    port: int = 0

    def __str__(self) -> str:
        name = f"[{self.name}]" if ":" in self.name else self.name
        return f"{'https://' * self.is_tls}{name}{f':{self.port}' * bool(self.port)}"


def _read_page_hosts(value: object) -> tuple[PageHost, ...]:
    expected = "names such as https://mx.example.com or mx.example.com"
    found = []
    for item in _items_of(value, expected):
        scheme, mark, rest = item.rpartition("://")
        try:
            name, port = split_host_port(rest.removesuffix("/"), 0)
        except ValueError:
            name, port = "", 0
        if not name or (mark and scheme.lower() not in {"http", "https"}):
            raise _fail(expected, item)
        found.append(PageHost(name.lower().removesuffix("."), scheme.lower() == "https", port))
    return tuple(dict.fromkeys(found))


def _read_web_url(value: object) -> str:
    text = _text_of(value, "http://... or https://...")
    if text and not re.fullmatch(r"(?i)https?://[^\s/?#\"'<>\\^`{|}@]+([/?#][^\s\"'<>\\^`{|}]*)?", text):
        raise _fail("http://host/ or https://host/, without a user", text)
    return text


def _joined(values: Iterable[object]) -> str:
    return ", ".join(mask(str(v)) for v in values)


TEXT = OptionType("text", lambda v: _text_of(v, "text"))
BOOLEAN = OptionType("true or false", _read_boolean, lambda v: "true" if v else "false", ("true", "false"))
DNS_SERVER = OptionType("a DNS server", _read_dns_server)
DESTINATION = OptionType("a destination", lambda v: _text_of(v, "host:port or a URL"), mask)
DESTINATIONS = OptionType(
    "destinations", lambda v: tuple(_items_of(v, "destinations, each host:port or a URL")), _joined, several=True
)
DEMOTED = OptionType("a table", _read_demoted, _show_demoted)
NETWORKS = OptionType("networks", _read_networks, _joined, several=True)
NETWORKS_OR_NONE = OptionType("networks", lambda v: _read_networks(v, none=True), _joined, several=True)
DOMAINS = OptionType("domains", _read_domains, _joined, several=True)
PAGE_HOSTS = OptionType("host names", _read_page_hosts, _joined, several=True)
WEB_URL = OptionType("a URL", _read_web_url)
HOST_NAME = OptionType("a host name", _read_host_name)
PATH = OptionType("a path", _read_path, lambda v: str(v) if v else "none")
REDIS_URL = OptionType("a Redis URL", _read_redis_url, mask)
SENTINELS = OptionType("Sentinels", _read_sentinels, _joined, several=True)
