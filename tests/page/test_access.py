"""Who may see and do what: every refusal, with the request that would have been the attack."""

from __future__ import annotations

import json
import re

import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from relay.ledger import keys, page_access
from relay.page import page as page_module
from relay.page import users
from relay.page.access import FORM_OCTETS, operator, signed, viewer
from relay.smtpd.passwords import hash_password
from support.raw_http import talk
from support.served_page import PASSWORD, PageClient, served_page, users_file

CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)


@viewer
async def _seen(_: Request) -> Response:
    return PlainTextResponse("bob@example.com")


@operator
async def _done(request: Request) -> Response:
    return PlainTextResponse(f"done {request.state.form.get('id')} by {request.state.visitor.name}")


@signed
async def _signed(_: Request) -> Response:
    return PlainTextResponse("signed")


async def _broken(_: Request) -> Response:
    raise ValueError("a secret of the view")


VIEWS = [
    Route("/test/seen", _seen, methods=["GET"]),
    Route("/test/done", _done, methods=["POST"]),
    Route("/test/signed", _signed, methods=["POST"]),
    Route("/test/broken", _broken, methods=["GET"]),
]


@pytest.fixture(autouse=True)
def views(monkeypatch):
    """Views that do nothing but say that they were reached."""
    monkeypatch.setattr(page_module.views, "ROUTES", [*page_module.views.ROUTES, *VIEWS])


def csrf_of(client: PageClient) -> str:
    return client.get("/").csrf


# Without users


def test_without_users_numbers_only(open_page):
    """Anybody on this host sees numbers; no address, no action, and the page says how to be let in."""
    client = open_page.client()
    first = client.get("/")
    assert first.status == 200
    assert "smtp-dup open" in first.text
    assert client.get("/test/seen").status == 403
    assert "bob@" not in client.get("/test/seen").text
    assert client.post("/test/done", {"id": "1"}).status == 403
    assert client.post("/login", {"name": "ann", "password": PASSWORD}).headers["location"] == "/"
    assert not client.cookies


def test_others_can_reach_it_and_there_are_no_users(redis_url, tmp_path):
    """The page is off, login and links too; the three paths are on."""
    with served_page(redis_url, tmp_path, listen="0.0.0.0") as served:
        client = served.client()
        for path in ("/", "/login", "/open", "/static/x.css", "/test/seen"):
            assert client.get(path).status == 404
        token = page_access.make_link(served.redis, "x", "operator")
        assert client.post("/open", {"token": token}).status == 404
        for path in ("/healthz", "/readyz", "/metrics"):
            assert client.get(path).status == 200


def test_an_empty_file_of_users_lets_in_by_links_only(redis_url, tmp_path):
    """Where others can connect, nobody sees anything without a link."""
    with served_page(redis_url, tmp_path, listen="0.0.0.0", status__users_file=str(users_file(tmp_path))) as served:
        assert served.client().get("/").headers["location"] == "/login"
        assert served.opened().get("/test/seen").status == 200


# With users


def test_nobody_sees_anything_before_logging_in(page):
    """A browser is sent to the login, and from there to where it wanted; a script hears 401."""
    client = page.client()
    reply = client.get("/test/seen?a=1")
    assert (reply.status, reply.headers["location"]) == (303, "/login?next=/test/seen%3Fa%3D1")
    assert client.get("/").headers["location"] == "/login"
    assert client.get("/test/seen", Accept="text/event-stream").status == 401
    assert client.post("/test/done", {"id": "1"}).status == 401
    assert 'value="/test/seen?a=1"' in client.get(reply.headers["location"]).text
    reply = client.log_in("ann", next="/test/seen?a=1")
    assert (reply.status, reply.headers["location"]) == (303, "/test/seen?a=1")
    assert client.get("/test/seen").text == "bob@example.com"


def test_a_login_ends_on_this_page(page):
    """Whatever ``next`` says, no other site is gone to, and no header added."""
    for place in ("//evil.example", "/\\evil.example", "https://evil.example", "/a\r\nSet-Cookie: x=1", "/\t/evil", "x",
                  "/%0d é"):  # fmt: skip
        reply = page.client().log_in("ann", next=place)
        assert reply.headers["location"] == "/", place
        assert len(reply.cookies) == 1, place


def test_an_operator_acts(page):
    """From the own page, with the session's token."""
    client = page.logged_in("ann")
    reply = client.post("/test/done", {"id": ["1", "2"], "csrf": csrf_of(client)})
    assert reply.text == "done ['1', '2'] by ann"


def test_a_viewer_changes_nothing(page):
    """With a token of its own, or an operator's: 403."""
    client, other = page.logged_in("victor"), page.logged_in("ann")
    assert client.get("/test/seen").status == 200
    for token in (csrf_of(client), csrf_of(other)):
        assert client.post("/test/done", {"id": "1", "csrf": token}).status == 403
    assert client.post("/test/signed", {"csrf": csrf_of(client)}).text == "signed"


@pytest.mark.parametrize("role", ["operator", "viewer"])
def test_a_link_has_its_role(open_page, role):
    client = open_page.opened(role)
    assert client.get("/test/seen").status == 200
    assert client.post("/test/done", {"csrf": csrf_of(client)}).status == (200 if role == "operator" else 403)


def test_a_post_without_the_sessions_token(page):
    """A form of another site or another session is not accepted."""
    client, another = page.logged_in("ann"), page.logged_in("ann")
    for token in (None, "", "A" * 22, "é", csrf_of(another), [csrf_of(client), "x"]):
        given = {} if token is None else {"csrf": token}
        assert client.post("/test/done", {"id": "1", **given}).status == 403, token
        assert client.post("/logout", given).status == 403, token
    assert client.get("/test/seen").status == 200


ELSEWHERE = [
    {"Origin": "http://evil.example"},
    {"Origin": "null"},
    {"Origin": "http://127.0.0.1"},  # another port of this host
    {"Origin": "https://{host}"},
    {"Origin": "http://{host}.evil.example"},
    {"Origin": ""},
    {"Sec_Fetch_Site": "cross-site"},
    {"Sec_Fetch_Site": "same-site"},
    {"Sec_Fetch_Site": "none"},
    {"Origin": None, "Sec_Fetch_Site": None},
    {"Origin": None, "Sec_Fetch_Site": "cross-site"},
]


def test_a_post_from_elsewhere(page):
    """Even with cookie and token, a POST that is not from this page's own origin does nothing; nor does a login."""
    client, stranger = page.logged_in("ann"), page.client()
    token = csrf_of(client)
    link = page_access.make_link(page.redis, "x", "operator")
    for forms in ELSEWHERE:
        headers = {name: value and value.format(host=client.host) for name, value in forms.items()}
        assert client.post("/test/done", {"id": "1", "csrf": token}, **headers).status == 403, headers
        assert stranger.post("/login", {"name": "ann", "password": PASSWORD}, **headers).status == 403, headers
        assert stranger.post("/open", {"token": link}, **headers).status == 403, headers
        assert not stranger.cookies, headers


def test_an_old_browser_that_sends_one_of_the_two(page):
    """Origin alone, or Sec-Fetch-Site alone, is enough where it says the same origin."""
    client = page.logged_in("ann")
    form = {"csrf": csrf_of(client)}
    assert client.post("/test/done", form, Sec_Fetch_Site=None).status == 200
    assert client.post("/test/done", form, Origin=None).status == 200


# Host


FOREIGN = (
    "evil.example", "evil.example:{port}", "localhost.evil.example", "localhost@evil.example", "", "127.0.0.2:{port}",
    "[::1", "localhost:99999999", "127.0.0.1:x", "local\thost", "10.0.0.1",
)  # fmt: skip


def test_a_foreign_host(page):
    """A name that suddenly means this machine (DNS rebinding) gets nothing of the page; health is answered."""
    cookies = page.logged_in("ann").cookies
    for host in FOREIGN:
        client = page.client(host.format(port=page.port) or " ")
        for path in ("/", "/login", "/test/seen", "/static/cockpit.css"):
            client.cookies = dict(cookies)
            reply = client.get(path)
            assert reply.status in {400, 421}, (host, path)
            assert not reply.cookies, (host, path)
        assert client.post("/test/done", {"id": "1"}).status in {400, 421}, host
        if " " not in client.host and "\t" not in client.host:
            assert client.get("/healthz").status == 200, host


def test_this_host_under_its_own_names(page):
    """A port that is published as another one does not matter."""
    for host in ("localhost:{port}", "LOCALHOST:1", "127.0.0.1", "[::1]:{port}", "localhost.:80"):
        assert page.client(host.format(port=page.port)).get("/login").status == 200, host


def test_two_hosts_or_none(page):
    """Neither is a request of a browser."""
    assert b" 400 " in talk(page.port, b"GET /login HTTP/1.1\r\nHost: localhost\r\nHost: evil\r\n\r\n")
    assert b" 400 " in talk(page.port, b"GET /login HTTP/1.1\r\n\r\n")
    assert b" 421 " in talk(page.port, b"GET /login HTTP/1.0\r\n\r\n")


def test_a_name_behind_tls(redis_url, tmp_path):
    """Its cookie is for TLS and this host alone, and its forms come from https; without TLS neither is so."""
    file = str(users_file(tmp_path, "ann:operator"))
    with served_page(
        redis_url, tmp_path, status__users_file=file, status__hosts="https://mx.example.com,plain.example.com"
    ) as served:
        secure = served.client("mx.example.com", secure=True)
        (cookie,) = secure.log_in("ann").cookies
        assert re.fullmatch(
            rf"__Host-smtp-dup-{served.port}=[\w-]{{43}}; HttpOnly; Path=/; SameSite=strict; Secure", cookie
        )
        assert secure.post("/test/done", {"csrf": csrf_of(secure)}).status == 200
        assert served.client("mx.example.com").log_in("ann").status == 403  # Origin http://
        (cookie,) = served.client("plain.example.com").log_in("ann").cookies
        assert re.fullmatch(rf"smtp-dup-{served.port}=[\w-]{{43}}; HttpOnly; Path=/; SameSite=strict", cookie)
        stolen = served.client("mx.example.com", secure=True)
        stolen.cookies = {f"smtp-dup-{served.port}": secure.cookies[f"__Host-smtp-dup-{served.port}"]}
        assert stolen.get("/test/seen").status == 303  # set without TLS, perhaps by somebody on the way


# Headers


def test_the_headers_of_every_answer(page):
    """Pages, refusals, errors and redirections have the same; none may be kept, and none names what we are made of."""
    client = page.logged_in("ann")
    for path in ("/", "/login", "/nothing", "/test/broken", "/test/done"):
        reply = client.get(path)
        assert reply.headers["content-security-policy"] == CSP, path
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert reply.headers["referrer-policy"] == "same-origin"
        assert reply.headers["cache-control"] == "no-store"
        assert not {"server", "x-powered-by", "access-control-allow-origin"} & reply.headers.keys()
    assert client.get("/test/done").status == 405


def test_static_files(page):
    """One with its digest may be kept for ever; any other path is none, and no file of this machine."""
    client = page.client()
    path = re.search(r'href="(/static/cockpit[^"]+css)"', client.get("/login").text)[1]
    reply = client.get(path)
    assert reply.status == 200
    assert reply.headers["content-type"] == "text/css; charset=utf-8"
    assert "immutable" in reply.headers["cache-control"]
    assert reply.headers["content-security-policy"] == CSP
    wrong = ["cockpit.css", "", "../access.py", "..%2faccess.py", "%2e%2e/access.py", "....//access.py", "/etc/passwd",
             "cockpit.000000000000.css", "..\\access.py", "%00", path.removeprefix("/static/") + "/x"]  # fmt: skip
    for name in wrong:
        assert client.get("/static/" + name).status in {303, 404}, name


def test_other_methods(page):
    """Nothing but GET, HEAD and the POSTs of forms; TRACE shows nobody a cookie."""
    client = page.logged_in("ann")
    cookie = f"{client.session_cookie}={client.cookies[client.session_cookie]}; x=secret"
    for method in ("OPTIONS", "TRACE", "PUT", "DELETE", "CONNECT", "POST", "get", "X" * 100):
        reply = client.ask(method, "/", Cookie=cookie)
        assert reply.status == 405, method
        assert "secret" not in reply.text, method
        assert client.ask(method, "/healthz").status == 405, method


def test_head_has_no_body(page):
    client = page.logged_in("ann")
    reply = client.ask("HEAD", "/")
    assert (reply.status, reply.text) == (200, "")
    assert int(reply.headers["content-length"]) > 100


def test_a_view_that_fails(page):
    """One page that tells nothing of why; the log does, and the next request is answered."""
    client = page.logged_in("ann")
    reply = client.get("/test/broken")
    assert reply.status == 500
    assert "secret" not in reply.text
    assert "Traceback" not in reply.text
    assert client.get("/").status == 200


# Forms


def test_a_form_that_is_too_large(page):
    """Beyond 64 KB it is refused, by what it says of itself or by what comes."""
    client = page.logged_in("ann")
    assert client.post("/test/done", b"csrf=x&a=" + b"x" * FORM_OCTETS).status == 413
    assert client.post("/test/done", {"csrf": csrf_of(client), "a": "x" * (FORM_OCTETS - 100)}).status == 200


def test_a_form_that_cannot_be_read(page):
    """One that is no form, that has too many fields, or that has none."""
    client = page.logged_in("ann")
    for body in (b"\xff\xfe", b"a=%ff", b"a&" * 6000, b"a=" + "é".encode()):
        assert client.post("/test/done", body).status == 400, body[:20]
    for body in (b"", b"&&&"):
        assert client.post("/test/done", body).status == 403, body


def test_another_type_of_form(page):
    """What another site's form could send without asking is no form of ours."""
    client = page.logged_in("ann")
    form = {"csrf": csrf_of(client)}
    for kind in ("text/plain", "application/json", "multipart/form-data; boundary=x", ""):
        assert client.post("/test/done", form, Content_Type=kind).status == 415, kind


# Sessions


def session_key(page) -> str:
    (key,) = page.redis.keys(keys.PAGE_SESSION + "*")
    return key.decode()


def test_a_session_is_a_token_that_redis_does_not_have(page):
    """Redis has its digest, for 30 minutes; whoever reads Redis has no cookie."""
    client = page.logged_in("ann")
    key = session_key(page)
    token = client.cookies[client.session_cookie]
    assert len(token) == 43
    assert token not in key + page.redis.get(key).decode()
    assert 1790 < page.redis.ttl(key) <= 1800


def test_a_login_has_a_new_token(page):
    """A cookie that somebody has planted, known to Redis or not, is not the one of the session."""
    attacker = page.logged_in("victor")
    planted = attacker.cookies[attacker.session_cookie]
    client = page.client()
    client.cookies = {attacker.session_cookie: planted}
    assert client.log_in("ann").status == 303
    assert client.cookies[client.session_cookie] != planted
    assert attacker.get("/test/seen").status == 303  # and what was planted has ended
    assert len(page.redis.keys(keys.PAGE_SESSION + "*")) == 1


def test_logout_ends_it_for_everybody_who_has_the_cookie(page):
    client = page.logged_in("ann")
    copy = page.client()
    copy.cookies = dict(client.cookies)
    reply = client.post("/logout", {"csrf": csrf_of(client)})
    assert (reply.status, reply.headers["location"]) == (303, "/login")
    assert re.match(
        rf'smtp-dup-{page.port}=""; expires=.*; HttpOnly; Max-Age=0; Path=/; SameSite=strict', reply.cookies[0]
    )
    assert not client.cookies
    assert copy.get("/test/seen").status == 303
    assert not page.redis.keys(keys.PAGE_SESSION + "*")


def test_a_session_ends_after_eight_hours(page):
    """However busy it is."""
    client = page.logged_in("ann")
    key = session_key(page)
    value = json.loads(page.redis.get(key))
    value["begun"] -= page_access.SESSION_SECONDS - 100
    page.redis.set(key, json.dumps(value))
    assert client.get("/test/seen").status == 200
    assert page.redis.ttl(key) <= 101  # also one that lost its end in Redis
    value["begun"] -= 101
    page.redis.set(key, json.dumps(value), ex=1000)
    assert client.get("/test/seen").status == 303
    assert not page.redis.exists(key)


def test_a_session_that_is_used_lives_on(page):
    """Half an hour counts from the last request; a request writes at most once a minute."""
    client = page.logged_in("ann")
    key = session_key(page)
    page.redis.expire(key, 100)
    client.get("/")
    assert page.redis.ttl(key) > 1700
    page.redis.expire(key, 1790)
    client.get("/")
    assert page.redis.ttl(key) <= 1790
    page.redis.delete(key)  # as Redis does when it is idle
    assert client.get("/").headers["location"] == "/login"


NONSENSE = [
    {"role": "root"}, {"role": None}, {"role": ["operator"]}, {"name": ""}, {"name": 7}, {"name": "x" * 300},
    {"name": "a\nb"}, {"name": "\x1b[31m"}, {"csrf": ""}, {"csrf": '"><script>'}, {"csrf": None}, {"mark": 7},
    {"mark": "zz"}, {"begun": "now"}, {"begun": None}, {"begun": True}, {"begun": 1e300}, {"begun": -1e300},
    {"begun": float("nan")}, {"begun": float("inf")}, {"begun": 10**400}, {"v": 2}, {"v": None},
]  # fmt: skip
NO_OBJECTS = [b"", b"\xff\xfe", b"null", b"[]", b"{}", b"1", b"[" * 5000, b'{"v":1}', b" " * 10_000]


def test_a_session_in_redis_that_makes_no_sense(page):
    """It lets nobody in, whatever it says, and the page goes on."""
    client = page.logged_in("ann")
    key, cookies = session_key(page), dict(client.cookies)
    whole = json.loads(page.redis.get(key))
    for value in (*(json.dumps({**whole, **change}).encode() for change in NONSENSE), *NO_OBJECTS):
        page.redis.set(key, value, ex=1000)
        client.cookies = dict(cookies)
        assert client.get("/test/seen").status == 303, value[:300]
    page.redis.set(key, json.dumps(whole), ex=1000)
    client.cookies = dict(cookies)
    assert client.get("/test/seen").status == 200


def test_a_session_of_another_type_in_redis(page):
    """Redis says WRONGTYPE: one page, no traceback."""
    client = page.logged_in("ann")
    key = session_key(page)
    page.redis.delete(key)
    page.redis.lpush(key, "x")
    assert client.get("/test/seen").status == 503
    client.cookies.clear()
    assert client.log_in("ann").status == 303


def test_a_cookie_that_is_no_session(page):
    """It is nobody's, and no error."""
    client = page.client()
    for token in ("", "x", "A" * 43, "A" * 42 + "=", "../" * 14 + "a", "A" * 5000, "é", '"', "*" * 43):
        client.cookies = {f"smtp-dup-{page.port}": token.encode().decode("latin-1")}
        assert client.get("/test/seen").status == 303, token


def test_a_user_who_is_gone(page, tmp_path, monkeypatch):
    """Removed from the file, with another password or another role: it counts at once, not at the next login."""
    monkeypatch.setattr(users, "LOOK_SECONDS", 0.0)
    ann, victor = page.logged_in("ann"), page.logged_in("victor")
    users_file(tmp_path, "victor:operator")
    assert ann.get("/test/seen").status == 303
    assert victor.post("/test/done", {"csrf": csrf_of(victor)}).status == 200
    path = users_file(tmp_path, "victor:operator")
    path.write_text(f"victor:{hash_password('another')}:operator\n")
    assert victor.get("/test/seen").status == 303


def test_a_file_of_users_that_breaks_leaves_the_former(page, tmp_path, monkeypatch):
    """Who was in stays, and may log in; nobody else."""
    monkeypatch.setattr(users, "LOOK_SECONDS", 0.0)
    client = page.logged_in("ann")
    (tmp_path / "users").write_text("ann:nonsense\n")
    assert client.get("/test/seen").status == 200
    assert page.logged_in("ann").get("/test/seen").status == 200
