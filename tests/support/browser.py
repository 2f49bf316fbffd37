"""A real browser for tests: Debian's Chromium, driven by Playwright; what it complains about is a failure."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import BrowserContext, ConsoleMessage, Page, sync_playwright

from support.page_site import PageSite

EXECUTABLE = Path("/usr/bin/chromium")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
)  # fmt: skip
AXE = Path(__file__).parent / "axe" / "axe.min.js"
_TAGS = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
_SECONDS = 20


class Browser:
    """One Chromium; ``open`` gives pages, ``complaints`` what their consoles and their policy said of them."""

    def __init__(self, browser: Any) -> None:
        self._browser = browser
        self.complaints: list[str] = []

    @contextmanager
    def open(
        self,
        site: PageSite,
        *,
        role: str = "",
        colour: str = "light",
        width: int = 1280,
        javascript: bool = True,
    ) -> Iterator[Page]:
        """Give a page of a site, logged in as a role where one is given. It must not complain about anything."""
        context = self._browser.new_context(
            base_url=site.url,
            color_scheme=colour,
            viewport={"width": width, "height": 900},
            java_script_enabled=javascript,
            reduced_motion="reduce",
        )
        context.set_default_timeout(_SECONDS * 1000)
        try:
            if role:
                log_in(context, site, role)
            page = context.new_page()
            page.on("console", self._note)
            page.on("pageerror", lambda error: self.complaints.append(f"error: {error}"))
            yield page
        finally:
            context.close()
        complaints, self.complaints = self.complaints, []
        assert not complaints, complaints

    def _note(self, message: ConsoleMessage) -> None:
        # A page that says 400 is a page; what it needs and does not get is a complaint.
        is_page = message.page is not None and message.location.get("url") == message.page.url
        if message.type in {"error", "warning"} and not (is_page and "the server responded" in message.text):
            self.complaints.append(f"{message.type}: {message.text}")


def log_in(context: BrowserContext, site: PageSite, role: str) -> None:
    """Have a context carry the session of a role."""
    name, token, _ = site.session(role)
    context.add_cookies([{"name": name, "value": token, "url": site.url}])


@contextmanager
def started() -> Iterator[Browser]:
    """Start a browser."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=EXECUTABLE, args=list(FLAGS))
        try:
            yield Browser(browser)
        finally:
            browser.close()


def barriers(page: Page, *rules: str) -> list[str]:
    """Return what axe finds that keeps people from using a page: by all rules, or by these."""
    # By the debugger's own way: the page's policy lets no script in that is not its own.
    if page.evaluate("typeof axe") == "undefined":
        page.evaluate(AXE.read_text("utf-8") + "\n;0")
    found = page.evaluate(
        "async (only) => (await axe.run(document, { runOnly: only, resultTypes: ['violations'] })).violations"
        ".map((one) => `${one.id}: ${one.nodes.map((node) => node.html.slice(0, 160)).slice(0, 3).join(' | ')}`)",
        {"type": "rule", "values": list(rules)} if rules else {"type": "tag", "values": _TAGS},
    )
    return [str(one) for one in found]
