"""Takes the pictures of docs/page.md from a running `smtp-dup demo`: ``python docs/site/screenshots.py [SECONDS]``.

It lets the demo send mail for some seconds (default 150) first, so that the plots have something to show; then it does
the same with `smtp-dup demo --routes`, where weights have been changed and a mailbox has moved. Needs
Playwright and Debian's Chromium, as the tests of the page do, and Pillow, which comes with `bench`.
"""

from __future__ import annotations

import io
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

IMAGES = Path(__file__).parents[1] / "images"
CHROMIUM = "/usr/bin/chromium"
SECONDS = 150
ROUTES = ("route weight shop shop=3 new=1 --yes", "move alice@example.com carol@example.com --to new --yes")
COLOURS = 96  # enough for a page, and a third of the octets
COMMAND = [sys.executable, "-m", "relay.command"]


def main() -> None:
    """Run the demo, and take each picture."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else SECONDS
    with demo(seconds) as (browser, state_dir):
        take_all(browser, state_dir)
    with demo(seconds, ROUTES) as (browser, state_dir):
        picture(opened(browser, state_dir, "light", 1280, 860), "page-routes.png", "/routes")


@contextmanager
def demo(seconds: float, acts: Sequence[str] = ()) -> Iterator[tuple[Browser, str]]:
    """Yield a browser, and the folder of a demo that has run for so long; with ``acts``, commands, one with routes."""
    words = [*COMMAND, "demo", *(["--routes"] if acts else [])]
    with tempfile.TemporaryFile("w+") as output, subprocess.Popen(words, stdout=output) as running:  # noqa: S603  (ours)
        try:
            state_dir = wait_for(output, r"--state-dir (\S+)")
            for act in acts:
                subprocess.run([*COMMAND, *act.split(), "--state-dir", state_dir], check=True)  # noqa: S603  (ours)
            time.sleep(seconds)  # the plots and lists of the pictures fill meanwhile
            with sync_playwright() as playwright:
                browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--headless", "--no-sandbox"])
                yield browser, state_dir
                browser.close()
        finally:
            running.terminate()


def wait_for(output: IO[str], pattern: str) -> str:
    """Return what a pattern finds in the demo's output, once it is there."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        output.seek(0)
        if found := re.search(pattern, output.read()):
            return found[1]
        time.sleep(0.2)
    raise SystemExit("the demo has not begun within a minute")


def take_all(browser: Browser, state_dir: str) -> None:
    """Take each picture."""
    page = opened(browser, state_dir, "light", 1280, 860)
    picture(page, "page-overview.png", "/")
    page.goto("/divergence")
    page.get_by_role("link", name="no such mailbox").first.click()
    picture(page, "page-divergence.png")
    picture(page, "page-failed.png", "/failed")
    picture(page, "page-cutover.png", "/cutover/new")
    picture(opened(browser, state_dir, "dark", 1280, 860), "page-dark.png", "/")
    phone = opened(browser, state_dir, "light", 390, 760)
    picture(phone, "page-phone.png", "/")
    page.goto("/failed")
    page.locator("tbody a").first.click()
    picture(page, "page-message.png")


def opened(browser: Browser, state_dir: str, colour: str, width: int, height: int) -> Page:
    """Return a page that is logged in by a link of `smtp-dup open`."""
    words = [*COMMAND, "open", "--state-dir", state_dir]
    said = subprocess.run(words, capture_output=True, text=True, check=True).stdout  # noqa: S603  (ours)
    link = re.search(r"(http://[^/]+)\S+", said)
    if link is None:
        raise SystemExit(f"no link in: {said}")
    context = browser.new_context(
        base_url=link[1], color_scheme=colour, viewport={"width": width, "height": height}, reduced_motion="reduce"
    )
    page = context.new_page()
    page.goto(link[0])
    page.get_by_role("button").first.click()
    page.get_by_role("heading", name="Overview").wait_for()
    return page


def picture(page: Page, name: str, path: str = "") -> None:
    """Take one, of what the window shows."""
    if path:
        page.goto(path)
    page.wait_for_timeout(1500)
    whole = Image.open(io.BytesIO(page.screenshot()))
    whole.convert("RGB").quantize(COLOURS).save(IMAGES / name, optimize=True)


if __name__ == "__main__":
    main()
