"""Fixtures of the page's tests: a running site with mail of every kind, and the page alone, in this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.page_site import ROUTES, PageSite
from support.served_page import ServedPage, served_page, users_file


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PageSite]:
    """A running product with users, mail and a route."""
    with PageSite(tmp_path_factory.mktemp("site"), routes=ROUTES) as made:
        yield made


@pytest.fixture
def page(redis_url: str, tmp_path: Path) -> Iterator[ServedPage]:
    """A page with the users ann (operator) and victor (viewer)."""
    users = users_file(tmp_path, "ann:operator", "victor:viewer")
    with served_page(redis_url, tmp_path, status__users_file=str(users)) as served:
        yield served


@pytest.fixture
def open_page(redis_url: str, tmp_path: Path) -> Iterator[ServedPage]:
    """A page without users, on a loopback address."""
    with served_page(redis_url, tmp_path) as served:
        yield served
