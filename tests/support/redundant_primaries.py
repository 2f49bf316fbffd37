"""The product with three primaries on a route: a, then b, then c; whoever answers, all of them get the mail."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from support.product import Product
from support.scripted_server import ScriptedServer

_ROUTE = """
[[server]]
name = "b"
url = "{b}"
[[server]]
name = "c"
url = "{c}"
[[route]]
name = "all"
servers = ["a", "b", "c"]
copies = "others"
return_after = "{return_after}"
"""


def redundant(
    product: Callable[..., Product],
    servers: Mapping[str, ScriptedServer],
    settings: Mapping[str, str],
    *,
    return_after: str,
    **options: Any,
) -> Product:
    """Start it with these servers; ``return_after`` is how long one that was away must be back."""
    addresses = {name: server.address for name, server in servers.items()}
    route = _ROUTE.format(**addresses, return_after=return_after)
    return product(primary=f"a={addresses['a']}", files={"settings.toml": route}, settings=settings, **options)
