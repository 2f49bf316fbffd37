"""For the site only: a link to a file of the source, beside docs, becomes its text, since the site has no such page."""

import re
from typing import Any

_OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./[^)\s]+\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by MkDocs with each page's text."""
    return _OUTSIDE.sub(r"\1", markdown)
