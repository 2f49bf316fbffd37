"""Under which keys an address is looked up in a table, and the key of an entry of such a table. Nothing here does I/O.

The forms are those of Postfix's transport(5), and ``@`` in front of a domain may be left out or not:
``user+tag@domain``, ``user@domain``, ``@domain``, ``@.parent`` (all below a domain, not itself), ``*``. Domains are
compared as A-labels in lower case, local parts without quotes. An address without a domain (``postmaster``) has no key.
"""

from __future__ import annotations

import ipaddress
import re
import unicodedata
from contextlib import suppress
from functools import lru_cache

NULL_SENDER = "<>"
EVERYBODY = "*"

_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"', re.DOTALL)
_BLANK = re.compile(r"[\s\x00-\x1f]")
_PAIR = re.compile(r"\\(.)", re.DOTALL)
_SOURCE_ROUTE = re.compile(r"@[^:]*:(?=.*@)")
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]*[a-z0-9_])?")
_LITERAL = re.compile(r"\[[0-9a-f:.]+\]|\[ipv6:[0-9a-f:.]+\]")
_DOTS = str.maketrans("\u3002\uff0e\uff61", "...")  # what IDNA takes for dots


def domain_key(domain: str) -> str:
    """Return a domain as it is compared: lower case, A-labels, without the dot of the root."""
    if domain.isascii():
        key = domain.lower().removesuffix(".")
        return _ipv6_literal(key) if key.startswith("[ipv6:") else key
    return ".".join(map(_a_label, domain.translate(_DOTS).split("."))).removesuffix(".")


def _ipv6_literal(literal: str) -> str:
    """Return the literal of an IPv6 address in the one form that RFC 5952 has; what is none as it is."""
    with suppress(ValueError):
        return f"[ipv6:{ipaddress.IPv6Address(literal[6:].removesuffix(']'))}]"
    return literal


def _a_label(label: str) -> str:
    """Return a label as DNS has it: by UTS 46 in its non-transitional form, which keeps sharp s and final sigma."""
    mapped = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", label).lower())
    if mapped.isascii():
        return mapped
    try:
        mapped.encode("utf-8")  # or what is none would be the A-label of no text
        return "xn--" + mapped.encode("punycode").decode("ascii")
    except UnicodeError:  # octets that are no UTF-8: equal to themselves only
        return mapped


def local_key(local: str, *, fold: bool) -> str:
    """Return a local part as it is compared: without quotes (RFC 5321 4.1.2), in NFC, and lower case if ``fold``."""
    if found := _QUOTED.fullmatch(local):
        local = _PAIR.sub(r"\1", found[1])
    if not local.isascii():
        local = unicodedata.normalize("NFC", local)
    return local.lower() if fold else local


def lookup_keys(address: str, *, fold: bool) -> list[str]:
    """Return the keys of an address, the most specific first; none for one without a domain, "<>" for the null one."""
    if not address:
        return [NULL_SENDER]
    if address[0] == "@":
        address = _SOURCE_ROUTE.sub("", address, count=1)
    local, at, domain = address.rpartition("@")
    if not at:
        return []
    name, host = local_key(local, fold=fold), domain_key(domain)
    keys = [f"{name}@{host}"]
    base, plus, _ = name.partition("+")
    if plus and base:
        keys.append(f"{base}@{host}")
    keys.append(f"@{host}")
    if host[:1] != "[":
        parent = host
        while parent := parent.partition(".")[2]:
            keys.append(f"@.{parent}")
    keys.append(EVERYBODY)
    return keys


def entry_key(entry: str, *, fold: bool) -> str:
    """Return the key of an entry of a table. Raises ValueError with what was expected."""
    text = entry.strip()
    if text in {EVERYBODY, NULL_SENDER}:
        return text
    local, at, domain = text.rpartition("@")
    is_below = not local and domain.startswith(".")
    key = domain_key(domain.removeprefix(".") if is_below else domain)
    if not is_domain(key) or (is_below and key.startswith("[")):
        raise ValueError("expected user@example.com, @example.com or @.example.com (all domains below it)")
    if not local:
        return f"@{'.' * is_below}{key}"
    if not at or not local_key(local, fold=fold) or (_BLANK.search(local) and not _QUOTED.fullmatch(local)):
        raise ValueError("expected a local part in front of the @, in quotes if there are blanks in it")
    return f"{local_key(local, fold=fold)}@{key}"


def covers(keys: frozenset[str], key: str) -> bool:
    """Return whether every address that this key matches is matched by one of ``keys``, too."""
    if key in keys or (EVERYBODY in keys and key != NULL_SENDER):
        return True
    if key in {EVERYBODY, NULL_SENDER}:
        return False
    local, _, domain = key.rpartition("@")
    if local:
        return any(other in keys for other in lookup_keys(key, fold=False))
    below = domain.removeprefix(".")
    parents = []
    while below := below.partition(".")[2]:
        parents.append(f"@.{below}")
    return any(parent in keys for parent in parents)


@lru_cache(maxsize=65536)  # a table has many addresses of each domain
def is_domain(key: str) -> bool:
    """Return whether this, made by ``domain_key``, is a domain or the literal of an address."""
    if key.startswith("["):
        return _LITERAL.fullmatch(key) is not None
    return bool(key) and len(key) <= 255 and all(map(_LABEL.fullmatch, key.split(".")))
