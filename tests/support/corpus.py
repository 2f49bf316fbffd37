"""Varied mail to send through everything: each message with its envelope, made the same way at every run.

A ``Mail`` says what is sent and, by ``stored``, what a mailbox must hold of it below the trace lines. Two repairs are
lawful, and ``stored`` knows no other: Postfix separates header and text, and smtp-dup makes a lone CR a line end.
"""

from __future__ import annotations

import importlib.util
import os
import random
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from email import policy
from email.message import EmailMessage
from pathlib import Path
from typing import Any

from support.dialogue import Dialogue
from support.postfix_instance import PostfixInstance
from support.waiting import PATIENCE

_HEADER = re.compile(rb"[!-9;-~]+[ \t]*:")


@dataclass(frozen=True, slots=True)
class Mail:
    """One message. ``content`` has CRLF line ends and is not dot-stuffed; ``way`` is smtp, bdat or sendmail."""

    name: str
    content: bytes
    recipients: tuple[str, ...] = ()
    sender: str = "sender@example.net"
    parameters: tuple[str, ...] = ()  # of MAIL
    recipient_parameters: tuple[str, ...] = ()  # of every RCPT
    way: str = "smtp"

    @property
    def stored(self) -> bytes:
        """What a mailbox holds of it below the trace lines: LF line ends, the last line ended, no lone CR."""
        text = _separated(self.content.replace(b"\r\n", b"\n").replace(b"\r", b"\n"))
        return text if text.endswith(b"\n") or not text else text + b"\n"

    def submit(self, front: PostfixInstance) -> None:
        """Hand it in; fails the test when anything is refused."""
        if self.way == "sendmail":
            _sendmail(front, self)
            return
        with Dialogue(front.port) as client:
            client.hello()
            client.say(" ".join((f"MAIL FROM:<{self.sender}>", *self.parameters)), 250)
            for recipient in self.recipients:
                client.say(" ".join((f"RCPT TO:<{recipient}>", *self.recipient_parameters)), 250)
            if self.way == "bdat":
                client.raw(b"BDAT %d LAST\r\n" % len(self.content) + self.content)
                client.expect(250)
            else:
                client.body(self.content)
            client.quit()


SOME, ALL = 100, 200  # messages: every kind that is written here; and what Python's tests and chance have besides


def mails(count: int = ALL) -> list[Mail]:
    """Return so many different messages, each to recipients of its own in example.com."""
    made = [*_shapes(), *_texts(), *_envelopes(150 if count >= ALL else 60), *_ways(), *_parts()]
    made += list(_python_tests())[: count - len(made)]
    made += _random_mails(count - len(made))
    assert len(made) == count
    addressed = []
    for number, mail in enumerate(made):
        recipients = mail.recipients or ("{}@example.com",)
        addressed.append(
            replace(
                mail,
                name=f"{number:03} {mail.name}",
                recipients=tuple(r.replace("{}", f"r{number:03}") for r in recipients),
                sender=mail.sender.replace("sender", f"sender{number:03}"),
            )
        )
    return addressed


def simple(number: int, *recipients: str, sender: str = "sender@example.com") -> Mail:
    """Return a plain message with a Message-ID, told apart by its number."""
    content = b"From: sender@example.com\r\nMessage-ID: <simple-%d@example.com>\r\nSubject: simple %d\r\n\r\n" % (
        number,
        number,
    )
    return Mail(f"simple {number}", content + b"text\r\n.\r\n" * 20, recipients, sender)


def _shapes() -> Iterator[Mail]:
    yield Mail("empty", b"")
    yield Mail("empty line only", b"\r\n")
    yield Mail("header only", b"Subject: no end of header\r\nX-Last: yes\r\n")
    yield Mail("header and its end", b"Subject: no body\r\n\r\n")
    yield Mail("body only", b"\r\nno header at all\r\nbut two lines\r\n")
    yield Mail("text without a header", b"this is no header line\r\nand this: neither\r\n")
    yield Mail("text that starts with a space", b" indented: text\r\nmore\r\n")
    yield Mail("a header that breaks off", _head("broken") + b"then text at once\r\nX-Late: header\r\n")
    yield Mail("empty lines at both ends", _head("blank") + b"\r\n\r\n\r\n\r\ntext\r\n\r\n\r\n\r\n")
    trace = b"Return-Path: <old@example.org>\r\nDelivered-To: old@example.org\r\n"
    trace += b"Received: from one by another;\r\n\tSun, 22 Nov 2026 00:00:00 +0000\r\n" * 20
    yield Mail("trace lines of its own", trace + _head("forwarded") + b"\r\ntext\r\n")
    yield Mail("twice the same header", _head("once") + _head("twice") + b"\r\nX: y\r\n")
    odd = b"X-Empty:\r\nX-Tabs:\tone\r\n\ttwo\r\n  three\t\r\nX-Trailing: spaces   \r\n"
    odd += b"x-8bit: gr\xfc\xdfe \xe2\x82\xac\r\nX!#$%&'*+-^_`{|}~: name\r\n"
    yield Mail("odd headers", _head("odd") + odd + b"\r\ntext\r\n")
    long = b"X-Long: " + b"y" * 9000 + b"\r\nX-Folded: one\r\n" + b" folded line that goes on and on\r\n" * 1000
    yield Mail("long header", _head("long") + long + b"\r\ntext\r\n")
    many = b"".join(b"X-%d: %d\r\n" % (n, n) for n in range(900))
    yield Mail("many headers", _head("many") + many + b"\r\ntext\r\n")
    private = b"Bcc: somebody@example.org\r\nContent-Length: 12345\r\n"
    yield Mail("blind copy header", _head("bcc") + private + b"\r\ntext\r\n")


def _texts() -> Iterator[Mail]:
    def text(name: str, body: bytes, *parameters: str) -> Mail:
        return Mail(name, _head(name.encode()) + b"\r\n" + body, parameters=parameters)

    every = bytes(b for b in range(1, 256) if b not in (10, 13))
    for declared in ((), ("BODY=8BITMIME",)):
        told = "declared" if declared else "undeclared"
        yield text(f"every octet, {told}", every + b"\r\n", *declared)
        yield text(f"UTF-8, {told}", "Grüße, Привет, 你好, \U0001f4e8\r\n".encode() * 50, *declared)
        yield text(f"Latin-1, {told}", "Grüße aus Köln\r\n".encode("latin-1") * 50, *declared)
    yield text("NUL", b"a\0b\r\n\0\r\n\0\0\0\r\nend\0\r\n", "BODY=8BITMIME")
    yield text("lone dots", b".\r\n..\r\n...\r\n.\r\n\r\n.\r\n")
    yield text("starts with a dot", b".first\r\n.second\r\n..third\r\n. fourth\r\n.\tfifth\r\n")
    yield text("dots only", b".\r\n" * 3000)
    yield text("commands", b"\r\n.\r\n.QUIT\r\nRSET\r\n.\r\nMAIL FROM:<x@example.org>\r\nDATA\r\n.\r\nQUIT\r\n")
    yield text("carriage returns", b"one\rtwo\r.\rthree\r\n.\rfour\r\n")
    yield text("control characters", bytes(b for b in range(1, 32) if b not in (10, 13)) + b"\x7f\r\n\x1a\x04\x03\r\n")
    yield text("spaces", b" \r\n\t\r\n  trailing   \r\n\r\n \r\n")
    yield text("mbox lines", b"From sender@example.net Sun Nov 22\r\n>From x\r\nFrom: y\r\n")
    for length in (997, 998, 999, 1000, 1001, 2047, 2048, 2049, 4096, 65_536, 1_000_000):
        yield text(f"line of {length}", b"x" * length + b"\r\n." + b"." * (length - 1) + b"\r\n")
    for length in (65_533, 65_534, 65_535, 65_536, 131_070, 131_071):
        # So that the dots come at the ends of chunks, wherever these are.
        yield text(f"dots around {length}", (b"z" * 61 + b"\r\n.\r\n..\r\n")[length % 7 :] * (length // 60))
    yield text("100,000 lines", b"\r\n" * 100_000)


def _envelopes(crowd: int) -> Iterator[Mail]:
    def to(name: str, *recipients: str, **more: Any) -> Mail:
        return Mail(name, _head(name.encode()) + b"\r\ntext for " + name.encode() + b"\r\n", recipients, **more)

    yield to("null sender", sender="")
    yield to("null sender, two recipients", "{}-a@example.com", "{}-b@example.com", sender="")
    yield to("many recipients", *(f"{{}}-{n}@example.com" for n in range(crowd)))
    yield to("very many recipients", *(f"{{}}-{n}@example.com" for n in range(2 * crowd)))
    yield to("odd local parts", "{}+tag=x@example.com", "{}.o'brien@example.com", "_{}-#$&*/?^`.{|}~@example.com")
    yield to("quoted local part", '"{} with space"@example.com')
    yield to("mixed case", "MixedCase-{}@Example.COM")
    yield to("longest local part", "{}" + "l" * 60 + "@example.com", sender="sender" + "s" * 55 + "@example.net")
    yield to("DSN never", recipient_parameters=("NOTIFY=NEVER",), parameters=("RET=HDRS", "ENVID=QQ314159"))
    yield to("DSN failure", recipient_parameters=("NOTIFY=FAILURE,DELAY",), parameters=("RET=FULL",))
    yield to("DSN original", recipient_parameters=("ORCPT=rfc822;first+2Baddress@example.org",))
    utf8 = {"parameters": ("SMTPUTF8", "BODY=8BITMIME")}
    yield to("UTF-8 recipient", "{}-получатель@example.com", **utf8)
    yield to("UTF-8 recipients", "{}-ü@example.com", "{}-plain@example.com", "{}-你好@example.com", **utf8)
    yield to("UTF-8 sender", sender="sender-отправитель@example.net", **utf8)
    header = "From: Jürgen <jürgen@bücher.example>\r\nSubject: Grüße\r\n\r\nÜmlaute\r\n".encode()
    yield Mail("UTF-8 header", header, ("{}-ß@example.com",), **utf8)


def _ways() -> Iterator[Mail]:
    date = b"Date: Sun, 22 Nov 2026 00:00:00 +0000\r\n"  # or Postfix would add one to what sendmail takes
    for way in ("bdat", "sendmail"):
        for name, body in {
            "whole": b"text\r\n",
            "no-final-newline": b"text\r\nlast line",
            "ends-with-dot": b"text\r\n.",
            "lone-dot-inside": b"text\r\n.\r\n..\r\n.more\r\n",
            "ends-in-eight-bit": b"text \xff\xfe\x80",
            "one-long-line": b"w" * 50_000,
        }.items():
            yield Mail(f"{way}, {name}", _head(f"{way}-{name}") + date + b"\r\n" + body, way=way)


def _parts() -> Iterator[Mail]:
    for number in range(12):
        yield Mail(f"MIME {number}", _multipart(number, size=200 + 3000 * number))
    yield Mail("MIME, 5 MB attachment", _multipart(99, size=5 << 20), parameters=("SIZE=8000000",))
    inner = _multipart(50, size=500)
    for depth in range(20):
        inner = _head(b"depth %d" % depth) + b"Content-Type: message/rfc822\r\n\r\n" + inner
    yield Mail("MIME, nested 20 deep", inner)
    yield Mail("MIME, broken", _multipart(51, size=500)[:-60] + b"\r\n--boundary-51-1\r\nno header here\r\n")


def _python_tests() -> Iterator[Mail]:
    for path in _python_test_files():
        text = path.read_bytes().replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        # A first line of an mbox is not part of the message, and Postfix rewrites it.
        text = text.partition(b"\n")[2] if text.startswith(b"From ") else text
        if text:
            yield Mail(f"Python's {path.name}", text.replace(b"\n", b"\r\n"))


def _python_test_files() -> list[Path]:
    try:
        found = importlib.util.find_spec("test.test_email.data")
    except ModuleNotFoundError:
        return []
    folders = found.submodule_search_locations if found is not None else None
    return sorted(path for folder in folders or () for path in Path(folder).glob("msg_*.txt"))


def _random_mails(count: int) -> Iterator[Mail]:
    for number in range(count):
        source = random.Random(number)
        lines = [_random_line(source) for _ in range(source.choice((1, 5, 50, 500)))]
        body = b"\r\n".join(lines) + b"\r\n"
        parameters = source.choice(((), ("BODY=8BITMIME",), ("BODY=7BIT",) if body.isascii() else ()))
        way = source.choice(("smtp", "smtp", "bdat"))
        yield Mail(f"random {number}", _head(b"random %d" % number) + b"\r\n" + body, parameters=parameters, way=way)


def _random_line(source: random.Random) -> bytes:
    kind = source.randrange(8)
    if kind == 0:
        return b"." * source.randrange(4)
    if kind == 1:
        return b"." + b"d" * source.randrange(80)
    if kind == 2:
        return bytes(source.choice(b"\t\x0b\x0c !~\x7f\x80\xa0\xff") for _ in range(source.randrange(60)))
    if kind == 3:
        return b"y" * source.randrange(5000)
    return b" ".join(b"word" * source.randrange(1, 4) for _ in range(source.randrange(15)))


def _multipart(number: int, size: int) -> bytes:
    """Return a MIME message with text, HTML, an image inside and an attachment of so many octets."""
    source = random.Random(number)
    message = EmailMessage(policy=policy.SMTP)
    message["From"] = "Ünal Sender <sender@example.net>"
    message["To"] = "Recipient <b@example.com>"
    message["Subject"] = f"Anhänge {number}: " + "sehr " * 30 + "lang"
    message["Message-ID"] = f"<multipart-{number}@example.net>"
    message.set_content("Grüße\n.\n..\nzwei Punkte\n", cte=source.choice(("8bit", "quoted-printable", "base64")))
    message.add_alternative("<p>Gr&uuml;&szlig;e</p>\n", subtype="html")
    message.add_attachment(source.randbytes(size), maintype="application", subtype="octet-stream", filename="größe.bin")
    for count, part in enumerate(part for part in message.walk() if part.is_multipart()):
        part.set_boundary(f"boundary-{number}-{count}")  # not a random one
    return message.as_bytes()


def _head(subject: bytes | str) -> bytes:
    text = subject.encode() if isinstance(subject, str) else subject
    name = re.sub(rb"[^A-Za-z0-9]", b"-", text)
    return b"From: a@example.net\r\nTo: b@example.com\r\nSubject: %s\r\nMessage-ID: <%s@example.net>\r\n" % (text, name)


def _separated(text: bytes) -> bytes:
    """Return a text with LF line ends with the empty line that Postfix puts after a header which breaks off."""
    position = 0
    while position < len(text) and not text.startswith(b"\n", position):
        continues = position > 0 and text[position] in b" \t"
        if not continues and not _HEADER.match(text, position):
            return text[:position] + b"\n" + text[position:]
        end = text.find(b"\n", position)
        position = len(text) if end < 0 else end + 1
    return text


def _sendmail(front: PostfixInstance, mail: Mail) -> None:
    etc = str(front.directory / "etc")
    done = subprocess.run(
        ["sendmail", "-C", etc, "-i", "-f", mail.sender, *mail.recipients],
        input=mail.content.replace(b"\r\n", b"\n"),
        env={**os.environ, "MAIL_CONFIG": etc},
        capture_output=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, f"{mail.name}: {done.stderr.decode()}"
