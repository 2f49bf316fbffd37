"""swaks as the client, option by option: what it hears, and what the primary and the backup get of it."""

from __future__ import annotations

import email
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from email import policy
from pathlib import Path
from typing import NamedTuple

import pytest

from relay.smtpd.passwords import hash_password
from support import swaks
from support.certificates import Certificate
from support.product import Product
from support.recorded_sessions import Transaction
from support.scripted_server import EXTENSIONS, ScriptedServer
from support.swaks import Conversation
from support.waiting import free_port, wait_until

ENVELOPE = ("--from", "a@example.net", "--to", "b@example.com")
AS_ANN = ("--auth-user", "ann", "--auth-password", "correct horse")
STAGES = ("CONNECT", "FIRST-EHLO", "TLS", "EHLO", "AUTH", "MAIL", "RCPT")
SIGHT = ("NAME", "ADDR", "PORT", "PROTO", "HELO", "IDENT", "SOURCE")


class Site(NamedTuple):
    """A relay with everything that a client may want of it, and the two servers behind."""

    relay: Product
    primary: ScriptedServer
    backup: ScriptedServer
    tls_port: int  # where TLS begins at once

    def swaks(self, *options: str, data: str = "", port: int = 0, host: str = "127.0.0.1") -> Conversation:
        """Send to b@example.com, unless the options say something else."""
        return swaks.swaks(f"{host}:{port or self.relay.smtp_port}", *ENVELOPE, *options, data=data)

    def arrived(self) -> Transaction:
        """Return the one message that has come, the same at the primary and at the backup; both forget it."""
        (first,), (second,) = self.primary.wait_for(1), self.backup.wait_for(1)
        assert second.body == first.body
        assert (second.sender, second.recipients) == (first.sender, first.recipients)
        self.forget()
        return first

    def forget(self) -> None:
        """Have the servers forget what came."""
        for server in (self.primary, self.backup):
            with server.changed:
                for connection in server.connections:
                    connection.transactions.clear()


@pytest.fixture(scope="module")
def made(certificate: Certificate, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Site]]:
    """Call it for a site with these settings; all end with the module."""
    if reason := swaks.unavailable():
        pytest.skip(reason)
    with ExitStack() as ends:

        def make(**settings: str) -> Site:
            folder = tmp_path_factory.mktemp("swaks")
            (folder / "users").write_text(f"ann:{hash_password('correct horse')}\n")
            tls_port = free_port()
            extensions = (*EXTENSIONS, f"XFORWARD {' '.join(SIGHT)}")
            primary, backup = (ends.enter_context(ScriptedServer(extensions=extensions)) for _ in range(2))
            relay = Product(
                folder,
                primary=primary.address,
                backups=[backup.address],
                settings={
                    "smtp.listen_tls": f"127.0.0.1:{tls_port}",
                    "smtp.tls_certificate": str(certificate.certificate),
                    "smtp.tls_key": str(certificate.key),
                    "smtp.max_connections": "4",  # one that is lost is missed
                    "smtp.users_file": str(folder / "users"),
                    **{key.replace("__", "."): value for key, value in settings.items()},
                },
            )
            site = Site(relay, primary, backup, tls_port)
            port = relay.smtp_port
            relay.settings["smtp.listen"] = f"127.0.0.1:{port},[::1]:{port}"
            ends.callback(relay.clean_up)
            relay.start(wait=False)
            # Not by a greeting: where a PROXY header comes first there is none without.
            wait_until(lambda: _is_ready(relay), message=lambda: relay.log[-4000:], interval=0.1)
            return site

        yield make


def _is_ready(relay: Product) -> bool:
    try:
        return relay.get("/readyz")[0] == 200
    except OSError:
        return False


@pytest.fixture(scope="module")
def open_site(made: Callable[..., Site]) -> Site:
    return made()


@pytest.fixture
def site(open_site: Site) -> Site:
    """A site that lets this machine in, and others who log in; empty."""
    open_site.forget()
    return open_site


# The protocol


@pytest.mark.parametrize(
    ("options", "keyword"),
    [
        ((), "ESMTP"),
        (("--protocol", "ESMTP"), "ESMTP"),
        (("--protocol", "SMTP"), "SMTP"),
        (("--protocol", "ESMTPS"), "ESMTPS"),
        (("--protocol", "ESMTPSA", *AS_ANN), "ESMTPSA"),
        (("--tls",), "ESMTPS"),
        (("--tls", "--tls-protocol", "tlsv1_2"), "ESMTPS"),
        (("--tls", "--tls-protocol", "tlsv1_3"), "ESMTPS"),
        (("--tls-optional",), "ESMTPS"),
        (("--pipeline",), "ESMTP"),
        (("--pipeline", "--tls", "--auth", "PLAIN", *AS_ANN), "ESMTPSA"),
        (("--tls", "--auth", "PLAIN", *AS_ANN), "ESMTPSA"),
        (("--tls", "--auth", "LOGIN", *AS_ANN), "ESMTPSA"),
        (("--auth-optional", "PLAIN", *AS_ANN), "ESMTP"),  # not offered without TLS
    ],
)
def test_protocols(site: Site, options: tuple[str, ...], keyword: str) -> None:
    """Every way in which mail may come is told by the trace line (RFC 3848), and the mail is the same."""
    done = site.swaks(*options, "--ehlo", "client.example", "--data", "Subject: x\\n\\none\\n.two\\n")
    assert done.status == swaks.FINE, done.transcript
    message = site.arrived()
    assert f" with {keyword} id ".encode() in message.trace
    assert b"from client.example ([127.0.0.1])" in message.trace
    assert message.content == b"Subject: x\r\n\r\none\r\n.two\r\n\r\n"  # swaks adds the last


def test_tls_from_the_first_octet(site: Site) -> None:
    """TLS on connect, and by the protocols that mean it."""
    for options in (("--tls-on-connect",), ("--protocol", "SSMTP"), ("--protocol", "SSMTPA", *AS_ANN)):
        done = site.swaks(*options, port=site.tls_port)
        assert done.status == swaks.FINE, done.transcript
        assert b" with ESMTPS" in site.arrived().trace


def test_tls_as_verified(site: Site, certificate: Certificate) -> None:
    """The certificate is the one that was set, for a client that looks."""
    verify = ("--tls-verify", "--tls-ca-path", str(certificate.certificate))
    assert site.swaks("--tls", *verify).status == swaks.FINE
    site.arrived()
    assert site.swaks("--tls", "--tls-verify").status == swaks.TLS_FAILED
    assert not site.primary.messages


@pytest.mark.parametrize("where", ["plain", "tls"])
def test_the_wrong_port(site: Site, where: str) -> None:
    """TLS where none is, and none where TLS is: refused at once, and the next client is served."""
    if where == "plain":
        assert site.swaks("--tls-on-connect").status == swaks.TLS_FAILED
    else:
        assert site.swaks("--timeout", "2", port=site.tls_port).status != swaks.FINE
    assert site.swaks().status == swaks.FINE
    site.arrived()


def test_old_tls(site: Site) -> None:
    """TLS 1.1 is not spoken."""
    assert site.swaks("--tls", "--tls-protocol", "tlsv1_1").status == swaks.TLS_FAILED
    assert not site.primary.messages


@pytest.mark.parametrize("protocol", ["LMTP", "LMTPS"])
def test_lmtp_is_refused(site: Site, protocol: str) -> None:
    """We are no LMTP server, and say so."""
    done = site.swaks("--protocol", protocol)
    assert done.status == swaks.HELO_REFUSED
    assert "500 5.5.2 Command not recognized" in done.heard
    assert not site.primary.messages


# Who it is


@pytest.mark.parametrize("mechanism", ["CRAM-MD5", "CRAM-SHA1", "LOGIN,CRAM-MD5"])
def test_mechanisms_that_are_not_offered(site: Site, mechanism: str) -> None:
    """A mechanism that we do not have is not taken: swaks sees that, or goes on with one that we have."""
    done = site.swaks("--tls", "--auth", mechanism, *AS_ANN)
    assert done.status == (swaks.FINE if "LOGIN" in mechanism else swaks.AUTH_FAILED), done.transcript
    if done.status == swaks.FINE:
        assert b" with ESMTPSA id " in site.arrived().trace
    assert not site.primary.messages


@pytest.mark.parametrize("mechanism", ["PLAIN", "LOGIN"])
def test_a_wrong_password(site: Site, mechanism: str) -> None:
    """535, and no word about which of the two was wrong."""
    for user in ("ann", "nobody"):
        done = site.swaks("--tls", "--auth", mechanism, "--auth-user", user, "--auth-password", "wrong")
        assert done.status == swaks.AUTH_FAILED
        assert "535 5.7.8 Authentication credentials invalid" in done.heard
    assert not site.primary.messages


def test_auth_without_tls(site: Site) -> None:
    """No password is asked for in the clear."""
    done = site.swaks("--auth", "PLAIN", *AS_ANN)
    assert done.status == swaks.AUTH_FAILED
    assert not any("AUTH" in line for line in done.heard)
    assert not site.primary.messages


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("client.example", "client.example"),
        ("[192.0.2.1]", "[192.0.2.1]"),
        ("[IPv6:2001:db8::1]", "[IPv6:2001:db8::1]"),
        ("under_score", "under_score"),
        ("grüße.example", "gr"),
        ("a b c", "a?b?c"),
        ("(comment)", "?comment?"),
        ("x" * 255, "x" * 255),
        ("$(reboot)", "??reboot?"),
        ("%s%n", "?s?n"),
        ("127.0.0.1;id=1", "127.0.0.1?id?1"),
    ],
)
def test_odd_names(site: Site, given: str, shown: str) -> None:
    """Whatever a client calls itself, its mail passes and the trace line stays one line of safe characters."""
    done = site.swaks("--ehlo", given)
    assert done.status == swaks.FINE, done.transcript
    first, *others = site.arrived().trace.split(b"\r\n")
    assert first.startswith(f"Received: from {shown}".encode())
    assert first.endswith(b" ([127.0.0.1])")
    assert len(others) == 3  # by, date, the end
    assert len(first) <= 998


def test_a_name_that_is_too_long(site: Site) -> None:
    """501 for a name of 256 octets."""
    done = site.swaks("--ehlo", "x" * 256)
    assert done.status == swaks.HELO_REFUSED
    assert any(line.startswith("501 5.5.4") for line in done.heard)


def test_xclient(site: Site) -> None:
    """XCLIENT from this machine: both servers hear whose mail it is, and the trace line is about that client."""
    who = ("--xclient-addr", "192.0.2.7", "--xclient-name", "mail.example.net", "--xclient-helo", "helo.example.net")
    done = site.swaks(*who)
    assert done.status == swaks.MAIL_REFUSED
    assert "530 5.7.0 Authentication required" in done.heard
    done = site.swaks(*who, "--xclient-login", "ann")
    assert done.status == swaks.FINE, done.transcript
    (copy,) = site.backup.wait_for(1)
    message = site.arrived()
    for got in (message, copy):
        assert got.xforward["ADDR"] == "192.0.2.7"
        assert got.xforward["NAME"] == "mail.example.net"
        assert got.xforward["HELO"] == "helo.example.net"
    assert b"from helo.example.net ([192.0.2.7])" in message.trace


def test_xclient_that_is_no_attribute(site: Site) -> None:
    """An attribute that we do not know is refused, before any mail."""
    done = site.swaks("--xclient-no-verify", "--xclient", "FOO=bar")
    assert done.status == swaks.XCLIENT_FAILED
    assert any(line.startswith("501 5.5.4") for line in done.heard)
    assert not site.primary.messages


# The message


def test_many_recipients(site: Site) -> None:
    """150 recipients, pipelined or not: all of them at both servers, in order."""
    recipients = [f"b{n}@example.com" for n in range(150)]
    for options in ((), ("--pipeline",)):
        done = site.swaks("--to", ",".join(recipients), *options)
        assert done.status == swaks.FINE, done.transcript
        assert site.arrived().recipients == recipients


def test_some_recipients_refused(site: Site) -> None:
    """swaks goes on with those that were accepted, pipelining or not; the copy is for these."""
    site.primary.replies["RCPT TO:<no@example.com>"] = "550 5.1.1 no such user"
    try:
        for options in ((), ("--pipeline",)):
            done = site.swaks("--to", "one@example.com,no@example.com,two@example.com", *options)
            assert done.status == swaks.FINE, done.transcript
            assert "550 5.1.1 no such user" in done.heard
            assert site.arrived().recipients == ["one@example.com", "two@example.com"]
            assert site.swaks("--to", "no@example.com", *options).status == swaks.NO_RECIPIENT
    finally:
        site.primary.replies.clear()
    assert not site.primary.messages


def test_a_large_attachment(site: Site, tmp_path: Path) -> None:
    """8 MB as an attachment arrive as they were."""
    content = bytes(range(256)) * (8 << 12)
    attachment = tmp_path / "large.bin"
    attachment.write_bytes(content)
    done = site.swaks("--attach", f"@{attachment}", "--suppress-data")
    assert done.status == swaks.FINE, done.transcript[-2000:]
    message = email.message_from_bytes(site.arrived().content, policy=policy.SMTP)
    (part,) = message.iter_attachments()
    assert part.get_content() == content


@pytest.mark.parametrize(
    "body",
    [
        ".",
        "..",
        ".\n.\n..\n...\n.x\n. \n",
        "\n\n.\n\n",
        "text\n.\nQUIT\nMAIL FROM:<x@example.net>\n.\n",
        "From here\n>From there\n",
        "Grüße, 你好\n",
        "x" * 5000,
        "",
    ],
)
def test_bodies(site: Site, body: str) -> None:
    """Dots at the starts of lines, long lines, UTF-8: what swaks was given is what comes out."""
    head = "From: a@example.net\nSubject: x\n\n"
    done = site.swaks("--data", "-", "--no-strip-from", data=head + body)
    assert done.status == swaks.FINE, done.transcript
    assert site.arrived().content == done.message
    # It takes a last lone dot for its own, and drops it.
    given = re.sub(r"\n\.?\n*\Z", "", head + body)
    assert done.message.startswith(given.replace("\n", "\r\n").encode())


def test_a_refusal_at_the_end(site: Site) -> None:
    """The primary's own words at the dot; no copy."""
    site.primary.replies["."] = "554 5.7.1 not this one"
    try:
        done = site.swaks()
    finally:
        site.primary.replies.clear()
    assert done.status == swaks.REFUSED_AT_END
    assert "554 5.7.1 not this one" in done.heard
    _nothing_left(site)
    assert not site.backup.messages


def test_over_ipv6(site: Site) -> None:
    """The same over IPv6, told so in the trace line."""
    done = site.swaks("-6", host="[::1]")
    assert done.status == swaks.FINE, done.transcript
    assert b"([IPv6:::1])" in site.arrived().trace


# Clients that leave


@pytest.mark.parametrize(
    ("leave", "stage"),
    [
        *(("--quit-after", stage) for stage in STAGES),
        *(("--drop-after", stage) for stage in STAGES),
        *(("--drop-after-send", stage) for stage in STAGES[1:]),  # at CONNECT there is nothing to send
    ],
)
def test_leaving_early(site: Site, leave: str, stage: str) -> None:
    """A client that leaves before its DATA leaves nothing behind: no message, no copy, no connection in use."""
    done = site.swaks(leave, stage, "--tls", "--auth", "PLAIN", *AS_ANN)
    assert done.status == swaks.FINE or leave == "--drop-after-send", done.transcript
    _nothing_left(site)
    assert not site.primary.messages
    assert not site.backup.messages
    assert site.swaks().status == swaks.FINE
    site.arrived()


@pytest.mark.parametrize("leave", ["--drop-after", "--drop-after-send"])
def test_leaving_at_data(site: Site, leave: str) -> None:
    """A client that leaves after DATA has sent no message; the primary's connection is closed, not used again."""
    site.swaks(leave, "DATA")
    _nothing_left(site)
    assert not site.primary.messages
    assert not site.backup.messages
    assert site.swaks().status == swaks.FINE
    site.arrived()


@pytest.mark.parametrize("leave", ["--drop-after", "--drop-after-send"])
def test_leaving_at_the_dot(site: Site, leave: str) -> None:
    """A client that leaves after its dot has sent a message: it is delivered and copied, once."""
    site.swaks(leave, "DOT", "--data", "Subject: x\\n\\ntext\\n")
    assert site.arrived().content == b"Subject: x\r\n\r\ntext\r\n\r\n"
    _nothing_left(site)
    assert not site.primary.messages


def _nothing_left(site: Site) -> None:
    """Nobody is connected, nothing waits, and the next message finds a connection to the primary."""
    relay = site.relay
    wait_until(lambda: relay.metric("smtpdup_clients") == 0, message=lambda: relay.get("/metrics")[1])
    assert relay.metric("smtpdup_in_flight_bytes") == 0
    row = relay.summary()
    assert (row["pending"], row["failed"]) == (0, 0)


# The PROXY protocol


@pytest.fixture(scope="module")
def balanced(made: Callable[..., Site]) -> Site:
    """A site behind a load balancer."""
    return made(smtp__proxy_protocol="true", smtp__allowed_networks="192.0.2.0/24,2001:db8::/32")


@pytest.mark.parametrize(
    ("version", "family", "source", "destination"),
    [
        ("1", "TCP4", "192.0.2.9", "192.0.2.1"),
        ("1", "TCP6", "2001:db8::9", "2001:db8::1"),
        ("2", "AF_INET", "192.0.2.9", "192.0.2.1"),
        ("2", "AF_INET6", "2001:db8::9", "2001:db8::1"),
    ],
)
def test_proxy(balanced: Site, version: str, family: str, source: str, destination: str) -> None:
    """The client is the one that the load balancer names: in the trace line, to both servers, and for what it may."""
    balanced.forget()
    addresses = ("--proxy-source", source, "--proxy-source-port", "40000", "--proxy-dest", destination)
    options = ("--proxy-version", version, "--proxy-family", family, *addresses, "--proxy-dest-port", "25")
    done = balanced.swaks(*options)
    assert done.status == swaks.FINE, done.transcript
    (copy,) = balanced.backup.wait_for(1)
    message = balanced.arrived()
    assert source.encode() in message.trace
    for got in (message, copy):
        assert got.xforward["ADDR"].removeprefix("IPV6:").removeprefix("IPv6:") == source


@pytest.mark.parametrize(
    "options",
    [
        (),  # none at all
        ("--proxy", "NONSENSE"),
        ("--proxy-version", "1", "--proxy", "TCP4 192.0.2.9 192.0.2.1 1 99999999"),
        ("--proxy-version", "2", "--proxy", "nonsense"),
    ],
)
def test_proxy_that_is_none(balanced: Site, options: tuple[str, ...]) -> None:
    """Without a proper header nobody is heard."""
    balanced.forget()
    assert balanced.swaks("--timeout", "7", *options).status != swaks.FINE
    assert not balanced.primary.messages


def test_proxy_for_a_stranger(balanced: Site) -> None:
    """A client that is named but not allowed may not send without a password."""
    balanced.forget()
    stranger = ("--proxy-version", "1", "--proxy", "TCP4 198.51.100.1 192.0.2.1 40000 25")
    done = balanced.swaks(*stranger)
    assert done.status == swaks.MAIL_REFUSED
    assert "530 5.7.0 Authentication required" in done.heard
    assert balanced.swaks(*stranger, "--tls", "--auth", "PLAIN", *AS_ANN).status == swaks.FINE
    balanced.arrived()
