"""The page in a real browser: every view, by mouse and by keyboard, with and without JavaScript, for everybody."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from relay.ledger import audit, divergence_groups, keys
from support.dialogue import Unexpected
from support.page_site import PASSWORD, PageSite
from support.waiting import wait_until

if TYPE_CHECKING:
    from playwright.sync_api import Page

    from support.browser import Browser

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A browser; the tests are skipped where there is none."""
    pytest.importorskip("playwright")
    from support import browser as browsers

    if not browsers.EXECUTABLE.exists():
        pytest.skip(f"no {browsers.EXECUTABLE}")
    with browsers.started() as made:
        yield made


def group_of(site: PageSite, text: str) -> divergence_groups.Group:
    with site.redis() as connection:
        return next(group for group in divergence_groups.groups(connection, "new") if text in group.text)


def failed_id(site: PageSite, recipient: str) -> str:
    rows = [json.loads(line) for line in site.product.run("failed", "list", "--json").stdout.splitlines()]
    return next(row["id"] for row in rows if recipient in row["recipients"])


def fail(site: PageSite, sender: str) -> None:
    """Have one more copy in the failed list."""
    with site.redis() as connection:
        before = connection.zcard(keys.FAILED + "new")
        site.product.send(sender, "frank@example.com")
        wait_until(lambda: connection.zcard(keys.FAILED + "new") > before)


def views(site: PageSite) -> dict[str, str]:
    """Return a path of every view."""
    group = group_of(site, "unknown")
    return {
        "overview": "/",
        "readiness": "/ready/new",
        "divergence": "/divergence",
        "by domain": "/divergence?by=domain&all=1",
        "reason": f"/divergence/new/{group.key}",
        "waiting": "/waiting",
        "failed": "/failed?code=5xx",
        "message": f"/message/{failed_id(site, 'frank@example.com')}",
        "backup": "/server/new",
        "cut-over": "/cutover",
        "plan": "/cutover/new",
        "routes": "/routes",
        "plan on a route": "/routes/pilot/old",
        "weights": "/routes/pilot?weight.new=9&weight.old=1",
        "wrong weights": "/routes/pilot?weight.new=9&weight.old=nonsense",
        "trace": "/trace?what=@example.com",
        "audit": "/audit",
        "nothing": "/failed?recipient=nobody@nowhere.test",
        "wrong": "/failed?code=nonsense",
    }


# For everybody ------------------------------------------------------------------------------------------------------


def test_a_user_logs_in_with_a_password_and_out_again(site: PageSite, browser: Browser) -> None:
    """A wrong password is told; the right one leads to where one wanted to go; logging out ends it."""
    with browser.open(site) as page:
        page.goto("/audit")
        assert page.url.endswith("/login?next=/audit")
        page.get_by_label("Name").fill("victor")
        page.get_by_label("Password").fill("wrong")
        page.get_by_role("button", name="Log in").click()
        assert "wrong" in page.get_by_role("alert").inner_text()
        page.get_by_label("Password").fill(PASSWORD)
        page.keyboard.press("Enter")
        page.get_by_role("heading", name="Audit").wait_for()
        page.get_by_role("button", name="Log out").click()
        page.get_by_role("button", name="Log in").wait_for()
        page.goto("/audit")
        assert "/login" in page.url


PHONES = (390, 360)  # pixels
STICKS_OUT = """
() => [...document.querySelectorAll(".card :is(button, .button, input, select)")]
    .filter(one => !one.closest(".wide"))
    .filter(one => one.getBoundingClientRect().right > one.closest(".card").getBoundingClientRect().right)
    .map(one => one.textContent.trim() || one.name)
"""


def barriers_of(page: Page, name: str, path: str, *, narrow: bool = False) -> dict[str, list[str]]:
    """Return what keeps somebody from using a view, in light and in dark colours, and whether it fits a phone.

    ``narrow``: axe looks at it there, too.
    """
    from support.browser import barriers

    page.goto(path)
    page.locator("h1").first.wait_for()
    page.emulate_media(color_scheme="light")
    found = {name: barriers(page)}
    page.emulate_media(color_scheme="dark")
    found[f"{name}, dark"] = barriers(page, "color-contrast")
    for width in PHONES:
        page.set_viewport_size({"width": width, "height": 900})
        if (needed := page.evaluate("document.documentElement.scrollWidth")) > width:  # nobody scrolls sideways
            found[f"{name}, {width}"] = [f"{needed} wide"]
        found[f"{name}, sticking out, {width}"] = page.evaluate(STICKS_OUT)
    if narrow:
        found[f"{name}, on a phone"] = barriers(page)
    page.set_viewport_size({"width": 1280, "height": 900})
    return {where: those for where, those in found.items() if those}


@pytest.mark.timeout(400)  # half a minute where nothing else runs
def test_no_view_has_a_barrier(site: PageSite, browser: Browser) -> None:
    """Axe finds nothing, contrast included, in light and in dark colours, and every view fits a phone.

    Nothing is wider than it, and a button or a field is within its card. The console stays empty: the policy holds, no
    script fails.
    """
    found: dict[str, list[str]] = {}
    with browser.open(site, role="operator") as page:
        for name, path in views(site).items():
            found |= barriers_of(page, name, path)
    with browser.open(site) as page:
        found |= barriers_of(page, "login", "/login")
    assert found == {}


LONG = "a-server-with-a-name-of-sixty-three-letters-which-is-the-longest"
CROWDED = """
[[server]]
name = "a-server-with-a-name-of-sixty-three-letters-which-is-the-longest"
url = "127.0.0.1:1"

[[route]]
name = "weighted"
match = { recipients = ["file:table", "@bücher.example", "@a.rather.long.domain.with.many.labels.below.shop.example"] }
primary = { new = 9, a-server-with-a-name-of-sixty-three-letters-which-is-the-longest = 1 }
copies = "others"

[[route]]
name = "in-order"
match = { senders = ["@in-order.example", "<>"], clients = "10.0.0.0/8" }
servers = ["old", "a-server-with-a-name-of-sixty-three-letters-which-is-the-longest"]
copies = "others"
"""


@pytest.mark.timeout(280)
def test_routes_with_all_that_they_show_have_no_barrier(browser: Browser, tmp_path: Path) -> None:
    """Tables, long names, a server that is away, a decision, who has moved, and the same once nobody has any more."""
    found: dict[str, list[str]] = {}
    table = tmp_path / "table"
    table.write_text("anna@example.com\n")
    with PageSite(tmp_path, routes=CROWDED.replace("file:table", f"file:{table}"), seed=False) as site:
        site.product.send("ann@example.net", "bert@in-order.example")
        assert (
            site.product.run(
                "move", "bert@example.com", "@moved.example", "--to", "new", "--force", "--note", "x", "--yes"
            ).returncode
            == 0
        )
        done = site.product.run("route", "weight", "weighted", "new=1", f"{LONG}=0", "--yes", "--now")
        assert done.returncode == 0, done.stderr
        table.write_text("anna@example.com\nno address\n")
        with browser.open(site, role="operator") as page:
            for text in ("Who has moved", "was decided to be", "away", "is no server of the settings"):
                page.goto("/routes")
                wait_until(lambda text=text: page.get_by_text(text).count() > 0, 30)
            for name, path in {
                "routes": "/routes",
                "overview": "/",
                "weights": f"/routes/weighted?weight.new=9&weight.{LONG}=1",
                "plan": f"/routes/in-order/{LONG}",
                "cut-over": "/cutover/new",
            }.items():
                found |= barriers_of(page, name, path, narrow=True)
            assert site.product.run("move", "bert@example.com", "@moved.example", "--back", "--yes").returncode == 0
            found |= barriers_of(page, "nobody any more", "/routes", narrow=True)
    assert found == {}


def test_every_view_is_there_without_javascript(site: PageSite, browser: Browser) -> None:
    """Whatever a view shows is in what the server sends, but for the plots, in whose place a picture is."""
    session = site.session("operator")
    for name, path in views(site).items():
        assert len(re.findall(r"<h1\b", site.get(path, session)[1])) == 1, name
    with browser.open(site, role="operator", javascript=False) as page:
        page.goto("/")
        assert page.locator(".plot svg").count() == 2
        assert page.get_by_text("NOT READY").count() == 1
        assert page.locator("table.criteria tbody tr").count() >= 15


def test_the_verdict_is_one_sheet_of_paper(site: PageSite, browser: Browser) -> None:
    """Printed, the overview and the evidence are a page each."""
    with browser.open(site, role="operator") as page:
        for path in ("/", "/ready/new"):
            page.goto(path)
            sheet = page.pdf(prefer_css_page_size=True)
            assert len(re.findall(rb"/Type\s*/Page\b", sheet)) == 1, path


# What goes on by itself ---------------------------------------------------------------------------------------------


def cell(page: Page, title: str) -> str:
    return page.locator("#servers tbody tr").nth(1).locator(f'[data-title="{title}"]').inner_text()


def test_the_overview_goes_on_by_itself_and_through_a_restart(site: PageSite, browser: Browser) -> None:
    """What has failed is seen on a page that is open; so it is after the product was stopped and started again."""
    with browser.open(site, role="operator") as page:
        page.goto("/")
        page.locator(".plot canvas").first.wait_for()
        before = int(cell(page, "failed"))
        site.product.send("late@example.net", "erin@example.com")
        wait_until(lambda: int(cell(page, "failed")) == before + 1 or page.wait_for_timeout(50))
        site.product.stop()
        page.locator("#stale").wait_for(state="visible")
        site.product.start()
        page.locator("#stale").wait_for(state="hidden")
        site.product.send("later@example.net", "erin@example.com")
        wait_until(lambda: int(cell(page, "failed")) == before + 2 or page.wait_for_timeout(50))
        browser.complaints.clear()  # the connection was refused meanwhile


def test_nothing_is_sent_to_a_page_that_nobody_sees(site: PageSite, browser: Browser) -> None:
    """The stream ends when the tab is hidden, and begins again when it is seen."""
    show = """(hidden) => {
        Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
        document.dispatchEvent(new Event("visibilitychange"));
    }"""
    with browser.open(site, role="operator") as page:
        with page.expect_request("**/live"):
            page.goto("/")
        page.locator(".plot canvas").first.wait_for()
        with page.expect_event("requestfailed", lambda request: request.url.endswith("/live")):
            page.evaluate(show, True)
        with page.expect_request("**/live"):
            page.evaluate(show, False)


# What an operator does ------------------------------------------------------------------------------------------------


def test_failed_copies_are_tried_again_by_mouse(site: PageSite, browser: Browser) -> None:
    """Ticked, looked at in a dry run, agreed to: then the server gets them, and they are out of the list."""
    site.new.replies.pop("RCPT TO:<grace@example.org>", None)
    message_id = failed_id(site, "grace@example.org")
    with browser.open(site, role="operator") as page:
        page.goto("/failed")
        page.get_by_label(f"Tick {message_id} for new").click()
        assert "the 1 that are ticked" in page.content()
        page.get_by_role("button", name="Try again").click()
        page.get_by_role("heading", name="1 copy would be retried").wait_for()
        with site.redis() as connection:
            assert connection.zscore(keys.FAILED + "new", message_id) is not None  # nothing is done yet
        page.get_by_role("button", name="Try again: 1 copy").click()
        page.get_by_text("1 copy will be tried again now.").wait_for()
    site.new.wait_until(lambda: any("grace" in line for line in site.new.commands))
    with site.redis() as connection:
        wait_until(lambda: connection.zscore(keys.FAILED + "new", message_id) is None)


def test_failed_copies_are_dropped_by_keyboard(site: PageSite, browser: Browser) -> None:
    """Without a mouse, and with the filter: what meets it is dropped for good, and nothing else."""
    fail(site, "twice@example.net")
    with browser.open(site, role="operator") as page:
        page.goto("/failed")
        page.get_by_label("sender").focus()
        page.keyboard.type("twice@example.net")
        page.keyboard.press("Enter")
        page.get_by_text("1 copy of").wait_for()
        page.get_by_label("all that meet the filter").focus()
        page.keyboard.press("Space")
        page.get_by_role("button", name="Drop").focus()
        page.keyboard.press("Enter")
        page.get_by_role("heading", name="1 copy would be dropped").wait_for()
        page.get_by_role("button", name="Drop: 1 copy").focus()
        page.keyboard.press("Enter")
        page.get_by_text("1 copy dropped.").wait_for()
        with site.redis() as connection:
            last = next(iter(audit.acts(connection)))
        assert (last.command, last.who) == ("failed drop", "the operator (page)")
        assert "--sender twice@example.net" in last.details["filter"]
        page.goto("/failed?recipient=frank@example.com")
        assert page.locator("tbody tr").count() == 1


def test_a_reason_is_acknowledged_by_keyboard_and_counts_again_by_mouse(site: PageSite, browser: Browser) -> None:
    """With a note and an end; a note that is missing is asked for where it belongs."""
    group = group_of(site, "unknown")
    with browser.open(site, role="operator") as page:
        page.goto("/divergence")
        page.get_by_role("link", name="no such mailbox").first.focus()
        page.keyboard.press("Enter")
        page.get_by_label("acknowledge: why").focus()
        page.keyboard.type("they have left")
        page.keyboard.press("Tab")
        page.keyboard.type("7d")
        page.keyboard.press("Enter")
        page.get_by_role("status").get_by_text("Acknowledged").wait_for()
        assert "they have left" in page.content()
        with site.redis() as connection:
            found = divergence_groups.group(connection, "new", group.key)
        assert found is not None
        assert found.ack is not None
        assert (found.ack.by, found.ack.note, round(found.ack.until - found.ack.at)) == (
            "the operator (page)", "they have left", 7 * 86400,
        )  # fmt: skip
        page.get_by_role("button", name="Let it count again").click()
        page.get_by_text("It counts again.").wait_for()


def test_a_backup_is_held_and_released_without_javascript(site: PageSite, browser: Browser) -> None:
    """The forms are all there is to it."""
    with browser.open(site, role="operator", javascript=False) as page:
        page.goto("/server/new")
        page.get_by_label("why").fill("the disk is being changed")
        page.get_by_label("for how long").fill("1h")
        page.get_by_role("button", name="Hold new").click()
        page.get_by_text("the disk is being changed").first.wait_for()
        page.get_by_role("button", name="Release").click()
        page.get_by_text("Released: it gets its copies again.").wait_for()


def test_copies_are_tried_again_without_javascript(site: PageSite, browser: Browser) -> None:
    """The dry run's page loads itself again until it has an end."""
    fail(site, "plain@example.net")
    with browser.open(site, role="operator", javascript=False) as page:
        page.goto("/failed?sender=plain@example.net")
        page.get_by_label("all that meet the filter").check()
        page.get_by_role("button", name="Try again").click()
        page.get_by_role("button", name="Try again: 1 copy").click()
        page.get_by_text("1 copy will be tried again now.").wait_for()


def test_a_backup_is_promoted_by_mouse_and_the_way_back_is_by_keyboard(site: PageSite, browser: Browser) -> None:
    """The name is typed, a server that is not ready takes a tick and a reason; then mail is answered by the other."""
    with browser.open(site, role="operator") as page:
        page.goto("/cutover")
        page.get_by_role("link", name="Promote new").click()
        page.get_by_label("type the name").fill("old")
        page.get_by_label("reason").fill("it is a test")
        page.get_by_role("button", name="Promote new").click()
        page.get_by_text("Type new to go on.").wait_for()
        assert page.get_by_text("new is not ready: tick this").count() == 1
        assert page.get_by_label("reason").input_value() == "it is a test"
        page.get_by_label("type the name").fill("new")
        page.get_by_label("I know").check()
        page.get_by_role("button", name="Promote new").click()
        page.get_by_text("new answers since").wait_for()
        assert page.locator("#run tbody tr .pill.ok").count() == 1
        site.new.replies["RCPT TO:<who@example.com>"] = "550 5.1.1 new says so"
        with pytest.raises(Unexpected, match="new says so"):
            site.product.send("me@example.net", "who@example.com")
        page.get_by_role("link", name="Undo").focus()
        page.keyboard.press("Enter")
        page.get_by_role("heading", name="Back to old").wait_for()
        page.get_by_label("type the name").focus()
        page.keyboard.type("old")
        page.keyboard.press("Enter")
        page.get_by_text("old answers since").wait_for()
        assert site.product.send("me@example.net", "who@example.com").startswith("250")
        page.goto("/audit")
        assert page.get_by_text("it is a test").count() == 1


def test_a_server_is_promoted_on_a_route_by_keyboard_and_back_without_javascript(
    site: PageSite, browser: Browser
) -> None:
    """The routes say who answers; another one is promoted there as for all mail, and undone in the same way."""
    with browser.open(site, role="operator") as page:
        page.goto("/")
        page.get_by_role("link", name="routes", exact=True).click()
        assert page.get_by_role("heading", name="pilot").count() == 1
        page.get_by_role("link", name="Promote old on pilot").focus()
        page.keyboard.press("Enter")
        page.get_by_role("heading", name="Promote old on pilot").wait_for()
        page.get_by_label("reason").fill("it is a test of routes")
        if page.get_by_label("I know").count():
            page.get_by_label("I know").check()
        page.get_by_label("type the name").fill("old")
        page.keyboard.press("Enter")
        page.get_by_text("On pilot old answers since").wait_for()
        site.old.replies["RCPT TO:<who@pilot.example>"] = "550 5.1.1 old says so"
        with pytest.raises(Unexpected, match="old says so"):
            site.product.send("me@example.net", "who@pilot.example")
        page.goto("/routes")
        page.get_by_text("decided by command").wait_for()
    with browser.open(site, role="operator", javascript=False) as page:
        page.goto("/cutover")
        page.get_by_role("link", name="Undo").click()
        page.get_by_role("heading", name="Back to new on pilot").wait_for()
        page.get_by_label("type the name").fill("new")
        page.get_by_role("button", name="Go back to new on pilot").click()
        page.get_by_text("On pilot new answers since").wait_for()
        wait_until(lambda: site.product.run("topology").returncode == 0, message="the relay does not follow")
        assert site.product.json("topology")[0]["settings_agree"]
        viewer = site.session("viewer")
        wait_until(lambda: "decided by command" not in site.get("/routes", viewer)[1])
        page.goto("/routes")
        assert page.get_by_role("link", name="Promote old on pilot").count() == 1


def test_a_viewer_sees_all_and_can_do_nothing(site: PageSite, browser: Browser) -> None:
    """There is no button but to log out and to look, in what the server sends and after its scripts have run."""
    harmless = {"Log out", "Filter", "Show", "Show what changes", "Look up"}
    session = site.session("viewer")
    for path in views(site).values():
        status, sent = site.get(path, session)
        texts = [
            re.sub(r"<[^>]+>", "", text).strip() for text in re.findall(r"(?s)<button\b[^>]*>(.*?)</button>", sent)
        ]
        assert "Log out" in texts, (path, status)
        assert set(filter(None, texts)) <= harmless, path
        assert len(re.findall(r"<form\b[^>]*\bmethod=\W?post", sent)) == 1, path
    with browser.open(site, role="viewer") as page:
        for path in ("/", "/failed?code=5xx"):
            page.goto(path)
            shown = [text for text in page.locator("button").all_inner_texts() if text.strip()]
            assert set(shown) <= harmless, path
            assert page.locator("form[method=post]").count() == 1, path
