"""The page of the product: where it is, the link that opens it, and what a restart or a reload changes."""

from __future__ import annotations

import json
from urllib.parse import parse_qs, urlsplit

import pytest

from support.product import Product
from support.scripted_server import ScriptedServer
from support.served_page import PageClient, users_file
from support.waiting import wait_until


def opened(running: Product, *words: str) -> PageClient:
    """Return a browser that has followed a link of `smtp-dup open`."""
    found = json.loads(running.run("open", "--json", *words).stdout)
    url = urlsplit(found["url"])
    client = PageClient(running.status_port, url.netloc)
    assert url.path == "/open"
    assert found["listens"]
    assert client.get(f"{url.path}?{url.query}").status == 200
    assert client.post(url.path, {"token": parse_qs(url.query)["token"][0]}).status == 303
    return client


def test_a_link_opens_the_page(product, primary: ScriptedServer, backup: ScriptedServer) -> None:
    """`up` says where it is; `open` lets in as what was asked for, which the audit says; the role is on the page."""
    running = product(primary=primary.address, backups=[backup.address])
    assert f"http://127.0.0.1:{running.status_port}" in next(
        line for line in running.log.splitlines() if '"page"' in line
    )
    assert "· operator" in opened(running).get("/").text
    assert "· viewer" in opened(running, "--role", "viewer").get("/").text
    acts = [json.loads(line) for line in running.run("audit", "--json").stdout.splitlines()]
    assert [(act["command"], act["after"]) for act in acts] == [("open", "viewer"), ("open", "operator")]
    lines = running.run("open").stdout.splitlines()
    assert lines[0].startswith(f"http://127.0.0.1:{running.status_port}/open?token=")
    assert max(map(len, lines)) <= 100


def test_an_open_page_outlives_housekeeping(product, primary: ScriptedServer, backup: ScriptedServer) -> None:
    """Killed under an open page, its successor knows the session; the browser only waits."""
    running = product(primary=primary.address, backups=[backup.address])
    client = opened(running)
    dead = running.child("housekeeping")
    dead.kill()
    wait_until(lambda: running.child("housekeeping").pid != dead.pid)
    assert "· operator" in client.get("/").text


def test_without_a_page_there_is_no_link(product, primary: ScriptedServer) -> None:
    """Where others can connect and nobody is named, or nothing listens: 1 and what to do."""
    running = product(primary=primary.address, settings={"status.listen": "off"}, start=False)
    running.start(wait=False)
    wait_until(lambda: running.run("queue", "summary").returncode == 0)
    done = running.run("open")
    assert (done.returncode, done.stdout) == (1, "")
    assert "status.listen" in done.stderr
    done = running.run("open", "--status-listen", ":18025")
    assert done.returncode == 1
    assert "status.users_file" in done.stderr


def test_a_file_of_users_that_cannot_be_used_ends_the_start(product, primary: ScriptedServer, tmp_path) -> None:
    """One line names the setting, the place and what was expected; `check` says it, too."""
    path = users_file(tmp_path, "ann:operator")
    path.write_text(path.read_text().replace(":operator", ":root"))
    running = product(primary=primary.address, settings={"status.users_file": str(path)}, start=False)
    done = running.run("up")
    assert done.returncode == 1
    assert f"status.users_file: {path}:1: expected name:hash:viewer or name:hash:operator" in done.stderr
    assert "expected name:hash:viewer" in running.run("check").stdout


@pytest.mark.parametrize("is_good", [True, False])
def test_a_reload_takes_other_users(
    product, primary: ScriptedServer, backup: ScriptedServer, tmp_path, is_good
) -> None:
    """Another file counts after a reload, for sessions that are open, too; one that cannot be used is refused."""
    first = users_file(tmp_path, "ann:operator", name="first")
    second = users_file(tmp_path, "victor:viewer", name="second")
    if not is_good:
        second.write_text("nonsense\n")
    text = '[relay]\ndestination_primary = "{}"\n[[backup]]\nurl = "{}"\nname = "new"\n[status]\nusers_file = "{}"\n'
    running = product(
        settings={"relay.destination_primary": "", "relay.destination_backups": ""},
        files={"settings.toml": text.format(primary.address, backup.address, first)},
    )
    client = PageClient(running.status_port)
    assert client.log_in("ann").status == 303
    (running.directory / "settings.toml").write_text(text.format(primary.address, backup.address, second))
    done = running.run("reload")
    assert done.returncode == (0 if is_good else 2), done.stderr
    if is_good:
        wait_until(lambda: client.get("/").status == 303)
        assert PageClient(running.status_port).log_in("victor").status == 303
    else:
        assert "status.users_file" in done.stderr
        assert client.get("/").status == 200
