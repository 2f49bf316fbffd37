"""A password goes to a server that the settings have named with it, whatever the ledger says."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import redis

from relay.daemon import known_passwords
from relay.daemon.retired_destinations import _with_password
from relay.ledger import keys, rq_jobs
from relay.mail.destination import Destination
from support.product import Product
from support.scripted_server import EXTENSIONS, ScriptedServer
from support.waiting import wait_until


def test_what_is_noted(tmp_path: Path) -> None:
    """What the settings have named stays named, privately, when they name it no more; a spoilt file names nothing."""
    one = Destination("one", "one.example", 25, username="u", password="p", password_from="env:ONE")
    two = Destination("two", "two.example", 25, username="u", password="p", password_from="env:TWO")
    assert known_passwords.remember(tmp_path, [one, Destination("plain", "plain.example", 25)]) == {one.to_json()}
    assert known_passwords.remember(tmp_path, [two]) == {one.to_json(), two.to_json()}
    assert known_passwords.remember(tmp_path, []) == {one.to_json(), two.to_json()}
    file = tmp_path / "named.json"
    assert file.stat().st_mode & 0o777 == 0o600
    assert '"p"' not in file.read_text()
    for spoilt in ("", "{}", "[1]", '["x"]', "null"):
        file.write_text(spoilt)
        assert known_passwords.remember(tmp_path, [two]) == {two.to_json()}


def test_tls_files_are_opened_where_the_settings_have_named_them(tmp_path: Path) -> None:
    """A destination that only Redis names opens no file of ours, whichever field has it; a named one keeps its."""
    fields = ("ca_file", "tls_certificate", "tls_key")
    for number, field in enumerate(fields):
        named = Destination(f"named{number}", "one.example", 25, tls="verify", **{field: "/etc/ours.pem"})
        known = known_passwords.remember(tmp_path, [named])
        assert _with_password(named, known) == named
        for stranger in (replace(named, host="evil.example"), replace(named, **{field: "/dev/zero"})):
            found = _with_password(stranger, known)
            assert not any(getattr(found, f) for f in fields)
            assert (found.host, found.tls) == (stranger.host, "verify")


def test_the_ledger_cannot_send_for_our_files(
    product: Callable[..., Product],
    primary: ScriptedServer,
    backup: ScriptedServer,
    scripted: Callable[..., ScriptedServer],
) -> None:
    """A destination that somebody has put into Redis gets no file of ours as its password; one that our settings have
    named, and name no more, still gets its own.
    """
    asking = [*EXTENSIONS, "AUTH PLAIN"]
    ours = scripted({"AUTH": "235 2.7.0 fine", "MAIL": "451 4.3.2 later"}, extensions=asking)
    thief = scripted({"AUTH": "235 2.7.0 fine"}, extensions=asking)
    one = product(primary=primary.address, settings={"retry.first": "1", "retry.longest": "1"}, start=False)
    secret = one.directory / "secret"
    secret.write_text("hunter2")
    login = f"AUTH PLAIN {base64.b64encode(bytes(1) + b'u' + bytes(1) + b'hunter2').decode()}"
    one.settings["relay.destination_backups"] = f"smtp://u@{ours.address}?tls=none&password_from=file:{secret}"
    one.start()
    one.send("a@example.com", "b@example.com", data=b"\r\nx\r\n")
    ours.wait_until(lambda: login in ours.commands)
    (waiting,) = wait_until(lambda: one.json("queue", "list"))
    one.stop()
    one.settings["relay.destination_backups"] = backup.address
    one.start()
    stolen = Destination("stolen", thief.host, thief.port, tls="none", username="u", password_from=f"file:{secret}")
    with redis.Redis.from_url(one.redis_url) as client:
        client.hset(keys.DESTINATIONS, "stolen", stolen.to_json())
        client.zadd(keys.PENDING + "stolen", {waiting["id"]: 1})
        rq_jobs.queue(client, "stolen").enqueue("workers.jobs.deliver", "stolen", [waiting["id"]])
    thief.wait_until(lambda: any(command.startswith("AUTH") for command in thief.commands), 40)
    assert login not in thief.commands
    assert "its password is not looked up" in one.log
    ours.replies.pop("MAIL")
    ours.wait_for(1, timeout=40)
    assert ours.commands.count(login) > 1
    assert "hunter2" not in one.log
