"""Logging in: right and wrong passwords, how often one may try, and links that are good once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from relay.ledger import keys, page_access
from relay.page import users
from relay.page.users import TRIES, TRIES_OF_NETWORK, Directory, Tries
from support.served_page import PASSWORD, served_page, users_file

WRONG = (("ann", "wrong"), ("ann", ""), ("nobody", PASSWORD), ("", ""), ("ann ", PASSWORD), ("Ann", PASSWORD),
         ("ann", "x" * 3000))  # fmt: skip


def test_a_wrong_name_or_password(page):
    """One text for both; no cookie, no session, and a line in the log without the password."""
    client = page.client()
    for name, password in WRONG:
        reply = client.log_in(name, password)
        assert reply.status == 401, name
        assert "Name or password is wrong." in reply.text, name
        assert not reply.cookies, name
    assert not page.redis.keys(keys.PAGE_SESSION + "*")


def test_what_was_typed_is_text(page):
    """A name is shown again, never as markup; a password never."""
    reply = page.client().log_in('"><script>alert(1)</script>', "a secret password")
    assert "<script>alert" not in reply.text
    assert "a secret password" not in reply.text


def test_too_many_tries(page):
    """Five a minute for a name, also with the right password then; others log in."""
    client = page.client()
    for _ in range(TRIES):
        assert client.log_in("ann", "wrong").status == 401
    assert client.log_in("ann").status == 429
    assert client.log_in("ann", "wrong").status == 429
    assert page.client().log_in("victor").status == 303


def test_a_right_password_forgives(page):
    """Who has mistyped it and then knows it has all tries again."""
    for _ in range(3):
        client = page.client()
        for _ in range(TRIES - 1):
            assert client.log_in("ann", "wrong").status == 401
        assert client.log_in("ann").status == 303


def test_many_at_once_get_no_more_tries(page):
    """Tries count before the password is looked at."""
    with ThreadPoolExecutor(20) as threads:
        found = list(threads.map(lambda _: page.client().log_in("ann", "wrong").status, range(20)))
    assert sorted(found) == [401] * TRIES + [429] * (20 - TRIES)


def test_tries_are_counted_by_network_and_forgotten_after_a_minute(monkeypatch):
    """A network has twenty for all names together; an IPv6 host cannot take another address of its own."""
    clock = [0.0]
    monkeypatch.setattr(users, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    tries = Tries()
    assert [tries.take("192.0.2.1", "ann") for _ in range(TRIES + 1)] == [True] * TRIES + [False]
    assert tries.take("192.0.2.2", "ann")
    assert sum(tries.take("192.0.2.3", f"name-{n}") for n in range(100)) == TRIES_OF_NETWORK
    assert sum(tries.take(f"2001:db8::{n:x}", "ann") for n in range(100)) == TRIES
    clock[0] = 59.9
    assert not tries.take("192.0.2.1", "ann")
    clock[0] = 60.1
    assert tries.take("192.0.2.1", "ann")


def test_what_is_kept_of_tries_is_bounded(monkeypatch):
    monkeypatch.setattr(users, "_KNOWN", 100)
    tries = Tries()
    for n in range(1000):
        tries.take(f"10.0.{n % 256}.{n // 256}", "x" * 200)
    assert len(tries._times) <= 100


# Links


def test_a_link_is_good_once(open_page):
    """Its page may be loaded often, also by a browser that looks ahead; the button works once."""
    token = page_access.make_link(open_page.redis, "root", "operator")
    first, second = open_page.client(), open_page.client()
    for client in (first, second, first):
        reply = client.get(f"/open?token={token}")
        assert (reply.status, reply.cookies) == (200, [])
    assert first.post("/open", {"token": token}).status == 303
    reply = second.post("/open", {"token": token})
    assert (reply.status, reply.cookies) == (403, [])
    assert "used or too old" in reply.text


def test_two_at_the_same_time(open_page):
    """One of them is let in."""
    token = page_access.make_link(open_page.redis, "root", "operator")
    with ThreadPoolExecutor(10) as threads:
        found = list(threads.map(lambda _: open_page.client().post("/open", {"token": token}).status, range(10)))
    assert sorted(found) == [303] + [403] * 9


def test_a_link_ends_after_a_minute(open_page):
    token = page_access.make_link(open_page.redis, "root", "operator")
    (key,) = open_page.redis.keys(keys.PAGE_LINK + "*")
    assert 55 < open_page.redis.ttl(key) <= page_access.LINK_SECONDS
    assert token.encode() not in key + open_page.redis.get(key)
    open_page.redis.delete(key)
    assert open_page.client().post("/open", {"token": token}).status == 403


def test_a_token_that_is_none(open_page):
    """It lets nobody in, and is no error."""
    client = open_page.client()
    for token in ("", "x", "A" * 43, "*", "../" * 14 + "x", "é" * 43, "A" * 60_000):
        assert client.post("/open", {"token": token}).status == 403, token[:50]
    assert client.post("/open", {}).status == 403


def test_a_token_on_its_page_is_text(open_page):
    assert "<script>" not in open_page.client().get("/open?token=%22%3E%3Cscript%3Ealert(1)%3C/script%3E").text


def test_a_link_in_redis_that_makes_no_sense(open_page):
    """It lets nobody in, whatever it says."""
    token = page_access.make_link(open_page.redis, "root", "operator")
    (key,) = open_page.redis.keys(keys.PAGE_LINK + "*")
    senseless = (b'{"v":1,"name":"x","role":"root"}', b'{"v":1,"name":"","role":"viewer"}')
    for value in (b"", b"null", b"\xff", b"[" * 5000, *senseless):
        open_page.redis.set(key, value)
        assert open_page.client().post("/open", {"token": token}).status == 403, value[:50]


def test_a_session_is_no_link_and_a_link_no_session(open_page):
    client = open_page.opened()
    token = client.cookies[client.session_cookie]
    assert open_page.client().post("/open", {"token": token}).status == 403
    other = open_page.client()
    other.cookies = {client.session_cookie: page_access.make_link(open_page.redis, "root", "operator")}
    assert "csrf" not in other.get("/").text


# The file of users


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("ann", "expected name:hash:viewer or name:hash:operator"),
        ("ann:{hash}", "expected name:hash:viewer or name:hash:operator"),
        ("ann:{hash}:root", "expected name:hash:viewer or name:hash:operator"),
        ("ann:secret:operator", "expected a hash made by `smtp-dup hash-password`"),
        (":{hash}:viewer", "expected a name that is not there yet"),
        ("ann:{hash}:viewer\nann:{hash}:operator", ":2: expected a name that is not there yet"),
        ("a\x1bnn:{hash}:viewer", "printable"),
    ],
)
def test_a_line_that_cannot_be_meant(tmp_path, line, text):
    """The place and what was expected, never the hash or a password."""
    path = users_file(tmp_path, "x:viewer")
    digest = path.read_text().split(":")[1]
    path.write_text(line.format(hash=digest) + "\n")
    with pytest.raises(OSError, match=r"^status\.users_file: ") as raised:
        Directory.read(path)
    assert text in str(raised.value)
    assert "secret" not in str(raised.value)
    assert digest not in str(raised.value)


def test_a_file_that_others_can_write(tmp_path):
    """Whoever could write it would decide who may log in."""
    path = users_file(tmp_path, "ann:operator")
    path.chmod(0o666)
    with pytest.raises(OSError, match="can be written by others"):
        Directory.read(path)
    with pytest.raises(OSError, match=r"^status.users_file: .*none cannot be read: No such file"):
        Directory.read(tmp_path / "none")


# Without Redis


def test_redis_is_away(redis_url, tmp_path):
    """Health is answered; the page says so in one page, with 503, and nobody is let in."""
    users_path = str(users_file(tmp_path, "ann:operator"))
    with served_page(
        redis_url, tmp_path, redis_at=f"unix://{tmp_path}/none.sock", status__users_file=users_path
    ) as served:
        client = served.client()
        assert client.get("/login").status == 200
        reply = client.log_in("ann")
        assert (reply.status, reply.cookies) == (503, [])
        assert "Redis is away" in reply.text
        assert reply.headers["retry-after"] == "3"
        client.cookies = {f"smtp-dup-{served.port}": "A" * 43}
        reply = client.get("/")
        assert reply.status == 503
        assert "Redis is away" in reply.text
        assert client.get("/healthz").status == 200


def test_redis_is_away_without_users(redis_url, tmp_path):
    with served_page(redis_url, tmp_path, redis_at=f"unix://{tmp_path}/none.sock") as served:
        reply = served.client().get("/")
        assert reply.status == 503
        assert "Redis is away" in reply.text
