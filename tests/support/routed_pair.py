"""A relay with two servers: the primary of all mail, and the one of a route by domain."""

from __future__ import annotations

from collections.abc import Callable

from support.product import QUICK, Product

# A server that is slow, not silent: what LMTP answers for each recipient takes its time.
_SETTINGS = {**QUICK, "relay.greeting_timeout_seconds": "2", "relay.command_timeout_seconds": "2"}
_FILE = """
[[server]]
name = "{name}"
url = "{url}"
[[route]]
name = "{name}"
match = {{ recipients = "@{domain}" }}
primary = {primary}
backups = []
{more}
"""


def routed(
    product: Callable[..., Product],
    first: str,
    second: str,
    domain: str,
    primary: str = "",
    *,
    more: str = "",
) -> Product:
    """Return the product with servers given as ``name=address``; ``second`` is for the domain, unless ``primary`` says.

    ``more`` is added to the route.
    """
    name, _, url = second.partition("=")
    file = _FILE.format(name=name, url=url, domain=domain, primary=primary or f'"{name}"', more=more)
    return product(primary=first, files={"settings.toml": file}, settings=_SETTINGS)
