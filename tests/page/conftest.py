"""Fixtures of the page's tests: a site with mail of every kind, and a browser, once for the tests of a module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.page_site import PageSite


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PageSite]:
    """A running product with users and mail."""
    with PageSite(tmp_path_factory.mktemp("site")) as made:
        yield made
