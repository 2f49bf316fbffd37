"""The pages about MTAs are true: their pieces make a real Postfix and a real Exim that deliver to both servers."""

from __future__ import annotations

import re
import shlex
import smtplib
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from support import documents
from support.exim_instance import EximInstance
from support.postfix_instance import PostfixInstance
from support.product import Product
from support.scripted_server import ScriptedServer
from support.waiting import free_port, wait_until

pytestmark = pytest.mark.postfix

Make = Callable[..., Product]
Start = Callable[[PostfixInstance], PostfixInstance]

PATIENT = {"minimal_backoff_time": "300s", "maximal_backoff_time": "300s", "queue_run_delay": "300s"}


# Postfix


def put(instance: PostfixInstance, files: dict[str, str], *, relay: int, old: int = 25, behind: int = 10026) -> None:
    """Add the page's pieces to an instance's configuration, with its own folder and ports in place of the page's."""
    etc = instance.directory / "etc"
    for name, text in files.items():
        for before, after in (
            ("/etc/postfix", str(etc)),
            ("[127.0.0.1]:2525", f"[127.0.0.1]:{relay}"),
            ("127.0.0.1:2525", f"127.0.0.1:{relay}"),
            ("[old.example.com]:25", f"[127.0.0.1]:{old}"),
            ("127.0.0.1:10026", f"127.0.0.1:{behind}"),
            ("192.0.2.10", "127.0.0.1"),
            ("smtp      inet", f"127.0.0.1:{instance.port} inet"),
            ("       y       ", "       n       "),  # a private instance is in no chroot
        ):
            text = text.replace(before, after)  # noqa: PLW2901 - step by step
        path = etc / name
        known = path.read_text() if path.exists() else ""
        if name == "master.cf":  # a service that the page defines takes the place of the instance's
            for service in re.findall(r"(?m)^\S+ +(?:inet|unix)", text):
                known = re.sub(rf"(?m)^{re.escape(service.split()[0])}\s+{service.split()[1]} .*\n", "", known)
        path.write_text(known + text)
    if "transport" in files:
        subprocess.run(["postmap", "-c", str(etc), f"hash:{etc}/transport"], check=True)


def check(instance: PostfixInstance) -> None:
    """Let Postfix look at a configuration: no fatal error, no parameter that nothing uses."""
    etc = str(instance.directory / "etc")
    for command in (["postfix", "-c", etc, "check"], ["postconf", "-c", etc, "-n"], ["postconf", "-c", etc, "-M"]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}: {done.stderr}{instance.log}"
        assert set(re.findall(r"unused parameter: (\w+)", done.stderr)) <= {"mailboxes"}, done.stderr  # the instance's
        assert "fatal" not in done.stderr + instance.log


@pytest.mark.parametrize("scenario", sorted({b.words[1] for b in documents.blocks() if b.kind == "postfix"}))
def test_postfix_has_no_objection(scenario: str, postfix: Start) -> None:
    """`postfix check` and postconf take the pieces of each scenario."""
    instance = PostfixInstance.front(free_port())
    try:
        put(instance, documents.pieces("postfix.md", scenario), relay=free_port(), behind=free_port())
        check(instance)
    finally:
        instance.remove()


@pytest.fixture
def stores(postfix: Start) -> tuple[PostfixInstance, PostfixInstance]:
    """An old and a new server that keep everything for two domains, and take XFORWARD as the page says."""
    pair = tuple(
        PostfixInstance.store(("example.com", "example.org"), smtpd_authorized_xclient_hosts="") for _ in range(2)
    )
    for store in pair:
        put(store, documents.pieces("postfix.md", "xforward"), relay=0)
    return postfix(pair[0]), postfix(pair[1])


def wait_copied(product: Product) -> None:
    wait_until(lambda: product.summary()["pending"] == 0 and product.summary()["delivered"] > 0)


def test_transport_map(product: Make, postfix: Start, stores: tuple[PostfixInstance, PostfixInstance]) -> None:
    """The map's domain goes to both servers, by the relay; both hear who the client was; another domain does not."""
    old, new = stores
    instance = product(primary=old.address, backups=[new.address])
    front = PostfixInstance(PATIENT, name="front")
    put(front, documents.pieces("postfix.md", "transport-map"), relay=instance.smtp_port)
    postfix(front)
    front.submit("alice@example.net", ["bob@example.com"], b"Subject: one\r\n\r\nhello\r\n")
    front.submit("alice@example.net", ["bob@elsewhere.test"], b"Subject: two\r\n\r\nhello\r\n")
    (at_old,), (at_new,) = old.wait_for(1), new.wait_for(1)
    assert at_old.endswith(b"Subject: one\n\nhello\n")
    assert at_new.endswith(b"Subject: one\n\nhello\n")
    wait_copied(instance)
    wait_until(lambda: "to=<bob@elsewhere.test>" in front.log)
    (line,) = (line for line in front.log.splitlines() if "status=sent" in line)
    assert "postfix/dup/smtp" in line
    assert f"relay=127.0.0.1[127.0.0.1]:{instance.smtp_port}" in line
    assert "postfix/dup" not in next(line for line in front.log.splitlines() if "to=<bob@elsewhere.test>" in line)
    for store in stores:
        wait_until(lambda store=store: "orig_client=" in store.log, message=lambda store=store: store.log)


def test_relay_down_without_a_fallback(
    product: Make, postfix: Start, stores: tuple[PostfixInstance, PostfixInstance]
) -> None:
    """Postfix waits, and delivers when the relay is back."""
    old, new = stores
    instance = product(primary=old.address, backups=[new.address])
    instance.stop()
    front = PostfixInstance(PATIENT, name="front")
    put(front, documents.pieces("postfix.md", "transport-map"), relay=instance.smtp_port)
    postfix(front)
    front.submit("alice@example.net", ["bob@example.com"], b"Subject: one\r\n\r\nhello\r\n")
    wait_until(lambda: "Connection refused" in front.log and "status=deferred" in front.log)
    assert not old.maildir_messages()
    instance.start()
    wait_until(lambda: not front.flush() and bool(old.maildir_messages()), interval=1)
    new.wait_for(1)


def past_the_relay(postfix: Start, relay: int, old: PostfixInstance) -> PostfixInstance:
    """Return a front with the page's fallback that has sent one message."""
    files = documents.pieces("postfix.md", "transport-map") | documents.pieces("postfix.md", "fallback")
    front = PostfixInstance(PATIENT, name="front")
    put(front, files, relay=relay, old=old.port)
    postfix(front)
    front.submit("alice@example.net", ["bob@example.com"], b"Subject: one\r\n\r\nhello\r\n")
    old.wait_for(1)
    wait_until(lambda: "status=sent" in front.log)
    assert f"relay=127.0.0.1[127.0.0.1]:{old.port}" in front.log
    return front


def test_fallback_past_the_relay(postfix: Start, stores: tuple[PostfixInstance, PostfixInstance]) -> None:
    """With the page's fallback the old server gets the mail while the relay is down, and nobody gets a copy."""
    old, new = stores
    past_the_relay(postfix, free_port(), old)
    assert not new.maildir_messages()


def test_fallback_after_a_deferral(
    product: Make, primary: ScriptedServer, backup: ScriptedServer, postfix: Start
) -> None:
    """Postfix also falls back when the relay hands on a 4xx: what is sent past it has no copy."""
    primary.replies["RCPT TO:<bob@example.com>"] = "450 4.2.0 greylisted"
    instance = product(primary=primary.address, backups=[backup.address])
    old = postfix(PostfixInstance.store())
    past_the_relay(postfix, instance.smtp_port, old)
    wait_until(lambda: "greylisted" in instance.log)
    assert instance.metric("smtpdup_messages_total", result="accepted") == 0
    assert instance.summary()["delivered"] == 0


def test_proxy_filter(product: Make, postfix: Start, stores: tuple[PostfixInstance, PostfixInstance]) -> None:
    """The old server itself passes its mail through the relay and back; with the relay gone its clients hear 451."""
    _, new = stores
    behind = free_port()
    instance = product(primary=f"127.0.0.1:{behind}", backups=[new.address], start=False)
    old = PostfixInstance.store(("example.com",))
    put(old, documents.pieces("postfix.md", "proxy"), relay=instance.smtp_port, behind=behind)
    postfix(old)
    instance.start()
    old.submit("alice@example.net", ["bob@example.com"], b"Subject: one\r\n\r\nhello\r\n")
    (at_old,), (at_new,) = old.wait_for(1), new.wait_for(1)
    assert at_old.endswith(b"Subject: one\n\nhello\n")
    assert at_new.endswith(b"Subject: one\n\nhello\n")
    assert b"(smtp-dup)" in at_old
    wait_copied(instance)
    assert "postfix/behind/smtpd" in old.log
    instance.stop()
    with pytest.raises((smtplib.SMTPDataError, smtplib.SMTPRecipientsRefused, smtplib.SMTPSenderRefused)) as refused:
        old.submit("alice@example.net", ["bob@example.com"], b"Subject: two\r\n\r\nhello\r\n")
    assert "451" in str(refused.value)


# Exim


def exim_front(program: Path, relay: int, old: int, *, fallback: bool = False) -> EximInstance:
    """Return an Exim that relays for this machine, with the page's pieces in their places."""
    files = {b.words[1]: b.text for b in documents.of("exim")}
    if fallback:
        files |= {b.words[1]: b.text for b in documents.of("exim-fallback")}
    transport = files["transport"].replace("port = 2525", f"port = {relay}")
    transport = transport.replace("old.example.com::25", f"127.0.0.1::{old}")
    instance = EximInstance(program)
    path = instance.directory / "exim.conf"
    text = path.read_text()
    text = text.replace("begin acl\n", f"{files['main']}begin acl\n")
    text = text.replace("domains = ! +ours", "domains = ! +duplicated_domains")
    text = text.replace("begin routers\n", f"begin routers\n{files['router']}")
    text = text.replace("begin transports\n", f"begin transports\n{transport}")
    path.write_text(text)
    return instance


def send_by(front: EximInstance) -> None:
    with smtplib.SMTP(front.host, front.port, timeout=20) as client:
        client.sendmail("alice@example.net", ["bob@example.com"], b"Subject: one\r\n\r\n" + b"x" * 2000 + b"\r\n")


def test_exim(
    product: Make, postfix: Start, exim_program: Path, stores: tuple[PostfixInstance, PostfixInstance]
) -> None:
    """The page's router and transport take a message, with a long line, to both servers."""
    old, new = stores
    instance = product(primary=old.address, backups=[new.address])
    with ExitStack() as ends:
        front = exim_front(exim_program, instance.smtp_port, old.port)
        ends.callback(front.remove)
        # The page's own look at it, with the answer that the page promises.
        (look,) = (b for b in documents.blocks() if b.page == "exim.md" and b.language == "sh")
        for line in look.text.splitlines():
            if line.startswith("exim "):
                said = front.ask(*shlex.split(line)[1:])
        assert "router = smtp_dup, transport = smtp_dup" in said
        front.start()
        send_by(front)
        (at_old,), (at_new,) = old.wait_for(1), new.wait_for(1)
        assert at_old.endswith(b"x" * 2000 + b"\n")
        assert at_new.endswith(b"x" * 2000 + b"\n")


def test_exim_fallback(postfix: Start, exim_program: Path, stores: tuple[PostfixInstance, PostfixInstance]) -> None:
    """With fallback_hosts the old server gets the mail while the relay is down."""
    old, new = stores
    with ExitStack() as ends:
        front = exim_front(exim_program, free_port(), old.port, fallback=True)
        ends.callback(front.remove)
        front.start()
        with smtplib.SMTP(front.host, front.port, timeout=20) as client:
            client.sendmail("alice@example.net", ["bob@example.com"], b"Subject: one\r\n\r\nhello\r\n")
        (at_old,) = old.wait_for(1)
        assert at_old.endswith(b"\nhello\n")
        assert not new.maildir_messages()
