"""The views by what they answer: to whom, to which form, to hostile words from mail, and how much of it."""

from __future__ import annotations

import concurrent.futures
import http.client
import io
import json
import re
import tarfile
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import pytest

from relay.ledger import audit, divergence_groups, divergence_upkeep, keys
from relay.ledger.divergence import DEFERRED, RCPT, REFUSED, Answer
from relay.mail.reply import Reply
from relay.page import live, views
from support.diverged_copies import Backup
from support.ledger_contents import Contents
from support.page_site import PageSite
from support.waiting import wait_until

EVIL = "<script>alert(1)</script>"
RTL = "\u202egnp.exe\u2066"
HOSTILE = f"{EVIL}\"'><img src=x onerror=alert(1)>{{{{7*7}}}}{RTL}\x1b[31m\x07"
LOCAL_PART = f'"{EVIL}{RTL}"'


def paths(site: PageSite) -> list[str]:
    """Return a path of every view, with what mail there is."""
    with site.redis() as connection:
        names = [name.decode() for name in connection.hkeys(keys.DESTINATIONS)]
        groups = [group for name in names for group in divergence_groups.groups(connection, name)]
        lists = [key + name for name in names for key in (keys.FAILED, keys.PENDING)]
        ids = [message_id.decode() for key in lists for message_id in connection.zrange(key, 0, 5)]
    plain = (
        "/ /ready/new /divergence?all=1 /divergence?by=domain&all=1 /divergence?by=recipient&all=1 "
        "/divergence?by=day&all=1 /waiting /failed /server/new /server/third /cutover /cutover/new /audit /trace "
        "/routes /routes/pilot /routes/pilot/old /routes/pilot?weight.new=9&weight.old=1"
    )
    reasons = [f"/divergence/{group.destination}/{group.key}" for group in groups]
    return [*plain.split(), *reasons, *(f"/message/{message_id}" for message_id in ids)]


def get_paths() -> list[str]:
    return [route.path for route in views.ROUTES if "GET" in (route.methods or ())]


def test_divergence_behind_the_conditions_of_the_command(site: PageSite) -> None:
    """Code, reply, domain, recipient and route narrow it; one that makes no sense is told at its field: 400."""
    viewer = site.session("viewer")
    with site.redis() as connection:
        names = [name.decode() for name in connection.hkeys(keys.DESTINATIONS)]
        groups = [group for name in names for group in divergence_groups.groups(connection, name)]
    one = next(group for group in groups if group.code and group.domains)
    path = f'href="/divergence/{one.destination}/{one.key}"'
    domain = next(iter(one.domains))
    for query, is_there in (
        ({"code": str(one.code)}, True), ({"code": "599"}, False), ({"domain": domain}, True),
        ({"domain": "nowhere.example"}, False), ({"reply": "no server says this"}, False),
        ({"recipient": f"@{domain}"}, True), ({"recipient": "nobody@nowhere.example"}, False),
    ):  # fmt: skip
        status, text = site.get(f"/divergence?all=1&{urllib.parse.urlencode(query)}", viewer)
        assert (status, path in text) == (200, is_there), query
    for name, value in (("code", "soon"), ("recipient", "nobody"), ("route", "nowhere")):
        status, text = site.get(f"/divergence?all=1&{name}={value}", viewer)
        assert (status, f'id="{name}-wrong"' in text or name == "route", path in text) == (400, True, False)


# Who sees and does what -----------------------------------------------------------------------------------------------


def test_every_form_wants_an_operator_of_this_session(site: PageSite) -> None:
    """A viewer, a form without its token or with another one, and a page from elsewhere change nothing, anywhere."""
    viewer, operator, other = site.session("viewer"), site.session(), site.session()
    forms = [route.path for route in views.ROUTES if "POST" in (route.methods or ())]
    assert len(forms) >= 10
    before = _acts(site)
    for form in forms:
        path = re.sub(r"{kind}", "failed", re.sub(r"{name}|{destination}", "new", form))
        path = re.sub(r"{key}|{id}", "0123456789ab", path)
        fields = {
            "action": "drop",
            "scope": "all",
            "typed": "new",
            "force": "1",
            "reason": "no",
            "note": "no",
            "for": "1h",
        }
        assert site.post(path, viewer, **fields)[0] == 403, form
        assert site.post(path, operator, csrf=other[2], **fields)[0] == 403, form
        assert site.post(path, operator, csrf="", **fields)[0] == 403, form
        assert site.post(path, None, **fields)[0] in {401, 403, 200}, form
        foreign = {
            "Cookie": f"{operator[0]}={operator[1]}",
            "Origin": "http://evil.test",
            "Sec-Fetch-Site": "cross-site",
        }
        body = f"csrf={operator[2]}&action=drop&scope=all".encode()
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(urllib.request.Request(site.url + path, body, foreign), timeout=10)
        with refused.value:
            assert refused.value.code == 403, form
    assert _acts(site) == before
    with site.redis() as connection:
        assert connection.zcard(keys.FAILED + "new") >= 3


def _acts(site: PageSite) -> int:
    with site.redis() as connection:
        return len(list(audit.acts(connection)))


def test_numbers_only_for_whoever_has_not_logged_in(tmp_path: Path) -> None:
    """Without users the overview has numbers: no address, no reply, no reason; and nothing else is shown at all."""
    with PageSite(tmp_path / "site", with_users=False) as site:
        operator = site.session()
        site.post("/server/new/hold", operator, reason="secret reason", **{"for": "1h"})
        status, text = site.get("/")
        assert status == 200
        assert "NOT READY" in text
        assert "held" in text
        for secret in (
            "@example",
            "User unknown",
            "5.1.1",
            "Greylisted",
            "secret reason",
            "the operator",
            "example.com",
        ):
            assert secret not in text, secret
        stream = _events(site, "/live", None)
        for secret in ("@example", "User unknown", "5.1.1", "Greylisted", "secret reason", "example.com"):
            assert secret not in stream, secret
        for path in get_paths():
            if path not in {"/", "/live"}:
                filled = re.sub(r"{\w+}", "new", path)
                assert site.get(filled)[0] == 403, path
        assert site.get("/audit", operator)[0] == 200


def _events(site: PageSite, path: str, session: tuple[str, str, str] | None) -> str:
    """Return what a stream begins with."""
    connection = http.client.HTTPConnection("127.0.0.1", site.product.status_port, timeout=20)
    try:
        headers = {"Cookie": f"{session[0]}={session[1]}"} if session else {}
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        assert answer.status == 200
        assert answer.getheader("X-Accel-Buffering") == "no"
        text = ""
        while not text.endswith("\n\n") or "event: parts" not in text:
            text += answer.read1().decode()
        assert text.startswith("retry: 3000\n\n")
        return text
    finally:
        connection.close()


# What mail says


@pytest.fixture
def hostile(site: PageSite) -> PageSite:
    """The site with mail and words that want to be more than text, in every place that is shown."""
    with site.redis() as connection:
        contents = Contents(connection, "third")
        diverged = Backup(contents, "third")
        long = f"550 5.7.1 {HOSTILE} " + "x" * 4096
        for kind, text in ((REFUSED, long), (DEFERRED, f"450 4.7.1 {HOSTILE} {'y ' * 2000}")):
            for _ in range(2):
                answer = Answer(kind, RCPT, Reply.of(int(text[:3]), text[4:]))
                message_id = contents.pending(f"{LOCAL_PART}@{EVIL}.test", to=["third"], sender=f"{LOCAL_PART}@x.test")
                diverged.attempt(message_id, {0: answer})
        group = divergence_groups.groups(connection, "third")[0]
        divergence_upkeep.acknowledge(connection, group, HOSTILE, HOSTILE * 20, 3600)
        audit.record(
            connection, audit.Act(HOSTILE, HOSTILE, HOSTILE, HOSTILE * 50, {HOSTILE: HOSTILE}, HOSTILE, HOSTILE)
        )
        event = [1.7e9, HOSTILE, HOSTILE, HOSTILE]
        connection.lpush(keys.EVENTS, json.dumps(event))
        connection.lpush(
            keys.OUTAGES + "third", json.dumps({"begin": 1.7e9, "end": 1.7e9 + 60, "reason": HOSTILE * 30})
        )
        connection.hset(keys.HEALTH + "third", "held", json.dumps([1.7e9, 0, HOSTILE, HOSTILE]))
    return site


def test_what_mail_says_is_text_in_every_view(hostile: PageSite) -> None:
    """No element, no direction, no escape sequence of anybody else's; and no answer is large for it."""
    session = hostile.session(name=EVIL)
    seen = 0
    for path in paths(hostile):
        status, text = hostile.get(path, session)
        assert (status, "Log out" in text) == (200, True), path
        _is_clean(text, path)
        seen += "&#39;&gt;&lt;img" in text
        assert len(text) < 400_000, path
    assert seen >= 10, seen
    for path in ("/live", "/cutover-live"):
        _is_clean(_events(hostile, path, session), path)
    status, text = hostile.get(
        "/failed?reply=%3Cscript%3Ealert(1)%3C/script%3E&code=%22%3E%3Cscript%3Ealert(1)", session
    )
    assert status == 400
    _is_clean(text, "filter")


def _is_clean(text: str, path: str) -> None:
    assert not re.search(r"<script(?! src=\"/static/)", text), path
    assert "<img" not in text, path
    assert not re.search("[\u202a-\u202e\u2066-\u2069\x00-\x08\x0b-\x1f\x7f]", text), path
    assert not re.search(r" on\w+=\"| style=", text), path


# How much


def test_a_sheet_of_a_long_list_is_short(site: PageSite) -> None:
    """Of thousands of failed copies a page has a hundred, and each is on one sheet only, whatever the filter."""
    session = site.session()
    with site.redis() as connection:
        Contents(connection, "third").many(2500, to="third", failed=True)
        total = connection.zcard(keys.FAILED + "third")
    ids: list[str] = []
    path = "/failed?destination=third"
    sheets = 0
    while path:
        status, text = site.get(path, session)
        assert status == 200
        assert len(text) < 300_000
        found = re.findall(r'name="copy" value="third:(\w+)"', text)
        assert len(found) <= 100
        ids += found
        sheets += 1
        following = re.search(r'href="([^"]+)" rel="next"', text)
        path = following[1].replace("&amp;", "&") if following else ""
    assert (len(ids), len(set(ids)), sheets) == (total, total, -(-total // 100))
    status, text = site.get("/failed?destination=third&sender=@n3.test", session)
    assert len(re.findall(r'name="copy"', text)) == 100
    status, text = site.get("/failed?destination=third&recipient=r2499@d99.test", session)
    assert re.findall(r'name="copy"', text) == ['name="copy"']


def test_many_are_dropped_once_their_number_is_typed(site: PageSite) -> None:
    """Above a hundred a click is not enough; what came behind the look stays."""
    session = site.session(name="dora")
    with site.redis() as connection:
        contents = Contents(connection, "third")
        contents.many(150, to="third", failed=True, replies=("554 5.7.1 to be dropped",))
        fields = {"action": "drop", "scope": "all", "destination": "third", "reply": "to be dropped"}
        _, text = _wait(site, site.post("/look/failed", session, **fields), session)
        assert "150 copies would be dropped" in text
        run = re.search(r'action="(/runs/[\w-]+/go)"', text)
        assert run is not None
        contents.many(1, to="third", failed=True, replies=("554 5.7.1 to be dropped",))
        _, text = site.post(run[1], session, number="15")
        assert "That was another number" in text
        other = site.session(name="eve")
        assert site.post(run[1], other, number="150")[0] == 404
        _, text = _wait(site, site.post(run[1], session, number="150"), session)
        assert "150 copies dropped." in text
        assert site.post(run[1], session, number="150")[0] == 404  # once
        assert "1 copy" in site.get("/failed?destination=third&reply=to+be+dropped", session)[1]


def _wait(site: PageSite, begun: tuple[int, str], session: tuple[str, str, str]) -> tuple[int, str]:
    """Load a run's page until its end."""
    assert begun[0] == 200, begun[1][:2000]
    live_path = re.search(r'data-live="(/runs/[\w-]+)/live"', begun[1])
    if live_path is None:
        return begun
    found: list[tuple[int, str]] = []

    def is_over() -> bool:
        found.append(site.get(live_path[1], session))
        return "data-live" not in found[-1][1]

    wait_until(is_over)
    return found[-1]


def test_failed_messages_are_exported_octet_by_octet(site: PageSite) -> None:
    """One by one or as a tar file; both are in the audit."""
    session = site.session(name="ned")
    with site.redis() as connection:
        message_id = connection.zrange(keys.FAILED + "new", 0, 0)[0].decode()
    content = site.product.run("failed", "export", message_id).stdout
    request = urllib.request.Request(
        f"{site.url}/failed/export",
        f"csrf={session[2]}&copy=new%3A{message_id}".encode(),
        {"Cookie": f"{session[0]}={session[1]}", "Origin": site.url, "Sec-Fetch-Site": "same-origin"},
    )
    with urllib.request.urlopen(request, timeout=20) as answer:
        packed = io.BytesIO(answer.read())
    with tarfile.open(fileobj=packed) as archive:
        assert archive.getnames() == [f"{message_id}.eml"]
        file = archive.extractfile(f"{message_id}.eml")
        assert file is not None
        assert file.read().decode().replace("\r\n", "\n") == content.replace("\r\n", "\n")
    status, text = site.post(f"/message/{message_id}/content", session)
    assert status == 200
    assert text.replace("\r\n", "\n") == content.replace("\r\n", "\n")
    with site.redis() as connection:
        last = [act for act in audit.acts(connection) if act.command == "failed export"][:2]
    assert {act.who for act in last} == {"ned (page)"}


def test_many_pages_are_open_and_health_answers(site: PageSite) -> None:
    """As many streams as there may be; one more is told to come again later, and the health paths are unharmed."""
    session = site.session()
    headers = {"Cookie": f"{session[0]}={session[1]}"}
    open_ones = [
        http.client.HTTPConnection("127.0.0.1", site.product.status_port, timeout=20) for _ in range(live.MOST)
    ]
    try:
        with concurrent.futures.ThreadPoolExecutor(8) as threads:
            list(threads.map(lambda one: one.request("GET", "/live", headers=headers), open_ones))
            answers = list(threads.map(lambda one: one.getresponse(), open_ones))
        assert {answer.status for answer in answers} == {200}
        for answer in answers:
            assert answer.read1().startswith(b"retry: 3000")
        status, text = site.get("/live", session)
        assert (status, "load this one again" in text) == (503, True)
        assert site.product.get("/healthz")[0] == 200
        assert site.get("/failed", session)[0] == 200
    finally:
        for one in open_ones:
            one.close()
    wait_until(lambda: _is_taken(site, headers))


def _is_taken(site: PageSite, headers: dict[str, str]) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", site.product.status_port, timeout=20)
    try:
        connection.request("GET", "/live", headers=headers)
        return connection.getresponse().status == 200
    finally:
        connection.close()
