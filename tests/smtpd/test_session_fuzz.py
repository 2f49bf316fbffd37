"""Whatever a client sends, it is answered by a stated rule, in time, and the primary gets exactly the mail that it was.

What should happen is worked out by a second reading of the same octets (``_Reader``), written for these tests from the
RFCs alone: lines end at LF, a body at CRLF.CRLF, a chunk after so many octets.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
import uvloop
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from loguru import logger

from relay.smtpd.passwords import hash_password
from support.certificates import Certificate
from support.in_process_relay import serve, settings_of
from support.redis_servers import RedisServer
from support.scripted_server import EXTENSIONS, ScriptedServer

SECONDS = 20.0
# Every 5xx that is ours, by rule: nothing else may be answered so to what the primary has not refused.
RULES = re.compile(
    r"500 5\.5\.2|501 5\.5\.[24]|501 5\.1\.3|50[23] 5\.5\.1|555 5\.5\.4|"
    r"550 5\.7\.30|552 5\.3\.4|554 5\.5\.1|554 5\.4\.6"
)
# And where there are users, a certificate, and bare line ends are refused.
MORE_RULES = re.compile(rf"{RULES.pattern}|550 5\.6\.11|500 5\.5\.6|501 5\.7\.0|504 5\.5\.4|53[05] 5\.7\.[08]")
REPLY = re.compile(rb"(?:[2-5]\d\d-[^\r\n]*\r\n)*[2-5]\d\d [^\r\n]*\r\n")


@dataclass
class _Reader:
    """What a byte stream means to a server that takes everything: ``mail`` is each (sender, body) to be accepted."""

    rest: bytes
    mail: list[tuple[str, bytes]] = field(default_factory=list)
    greeted: bool = False
    extended: bool = False
    sender: str | None = None
    recipients: int = 0
    chunks: bytes | None = None

    def read(self) -> list[tuple[str, bytes]]:
        while b"\n" in self.rest:
            line, _, self.rest = self.rest.partition(b"\n")
            line = line.rstrip(b"\r")
            if not self._obey(line.decode("latin-1")):
                break
        return self.mail

    def _obey(self, line: str) -> bool:
        verb, _, argument = line.partition(" ")
        argument = argument.strip()
        if re.search(r"[\x00-\x1f\x7f]", line):
            return True
        match verb.upper():
            case "EHLO" | "HELO" if argument:
                self.greeted, self.extended = True, verb.upper() == "EHLO"
                self._reset()
            case "MAIL" if self.greeted and self.sender is None:
                self.sender = argument[6:-1]
            case "RCPT" if self.sender is not None and self.chunks is None:
                self.recipients += 1
            case "DATA" if self.recipients and self.chunks is None and not argument:
                end = (b"\r\n" + self.rest).find(b"\r\n.\r\n")
                if end < 0:
                    return False
                self._accept(_without_bare(self.rest[:end]))
                self.rest = self.rest[end + 3 :]
            case "BDAT":
                return self._chunk(argument)
            case "RSET" if not argument:
                self._reset()
            case "QUIT":
                return bool(argument)
        return True

    def _chunk(self, argument: str) -> bool:
        words = argument.split(" ")
        if not words[0].isdigit() or words[1:] not in ([], ["LAST"]):
            return False
        size = int(words[0])
        if len(self.rest) < size:
            return False
        chunk, self.rest = self.rest[:size], self.rest[size:]
        if self.recipients and self.extended:
            self.chunks = (self.chunks or b"") + chunk
            if words[1:]:
                self._accept(_stuffed(self.chunks))
        return True

    def _accept(self, body: bytes) -> None:
        assert self.sender is not None
        self.mail.append((self.sender, body))
        self._reset()

    def _reset(self) -> None:
        self.sender, self.recipients, self.chunks = None, 0, None


def _lines(body: bytes) -> list[tuple[bytes, bytes]]:
    """Return each line with the line end that it came with."""
    return [(m[1], m[2]) for m in re.finditer(rb"([^\r\n]*)(\r?\r\n|\r|\n|\Z)", body, re.DOTALL) if m[0]]


def _without_bare(body: bytes) -> bytes:
    out, before = b"", b"\r\n"
    for text, end in _lines(body):
        bare = before not in (b"\r\n", b"\r\r\n")
        out += b"." if text == b"." or (bare and text[:1] == b"." != text[1:2]) else b""
        out += text + b"\r\n"
        before = end
    return out


def _stuffed(body: bytes) -> bytes:
    return b"".join((b"." if text[:1] == b"." else b"") + text + b"\r\n" for text, _ in _lines(body))


# What clients say

TEXT = st.lists(
    st.sampled_from(
        [
            b"x",
            b".",
            b"..",
            b"\r\n",
            b"\r\n.",
            b"\n",
            b"\r",
            b"\r\r\n",
            b"\n.\n",
            b"\r.\r",
            b"\0",
            b"\r\n\r\n",
            b"DATA\r\n",
        ]
    ),
    max_size=12,
).map(b"".join)
SENDERS = st.integers(0, 99).map(lambda n: b"MAIL FROM:<s%d@example.com>\r\n" % n)
DATA = TEXT.map(lambda text: b"DATA\r\n" + text + b"\r\n.\r\n")
CHUNK = st.tuples(TEXT, st.sampled_from([b"", b" LAST"])).map(lambda c: b"BDAT %d%s\r\n%s" % (len(c[0]), c[1], c[0]))
OTHERS = [b"RCPT TO:<b@example.com>\r\n", b"RSET\r\n", b"NOOP\r\n", b"EHLO x\r\n", b"HELO x\r\n", b"QUIT\r\n",
          b"DATA now\r\n", b"FOO\r\n", b"RSET\n", b"\r\n", b"NOOP \0\r\n", b"BDAT x\r\n", b"VRFY x\r\n"]  # fmt: skip
WHOLE = st.tuples(SENDERS, st.one_of(DATA, CHUNK)).map(lambda m: m[0] + OTHERS[0] + m[1])
TALK = st.lists(st.one_of(WHOLE, WHOLE, SENDERS, DATA, CHUNK, st.sampled_from(OTHERS)), max_size=12).map(b"".join)
SENSE = st.one_of(TALK.map(lambda talk: b"EHLO x\r\n" + talk), TALK)
NONSENSE = st.one_of(st.binary(max_size=2000), st.lists(st.one_of(st.binary(max_size=50), TALK)).map(b"".join))
CUTS = st.lists(st.integers(0, 1000), max_size=5)
NAMING = st.lists(
    st.sampled_from(
        [
            b"ADDR=192.0.2.7",
            b"ADDR=IPv6:2001:db8::7",
            b"NAME=a+2Bb",
            b"HELO=+0D+0A",
            b"PORT=25",
            b"PROTO=ESMTP",
            b"LOGIN=ann",
            b"SOURCE=LOCAL",
            b"X=y",
            b"NAME",
            b"ADDR=[UNAVAILABLE]",
            b"+",
            b"=",
            b"\xff",
        ]
    ),
    max_size=4,
)
PROOFS = [b"", b"=", b"*", b"AGFubgBjb3JyZWN0IGhvcnNl", b"YW5u", b"Y29ycmVjdCBob3JzZQ==", b"AAA=", b"%%%", b"A" * 13000]
LOGIN = st.lists(st.sampled_from(PROOFS), max_size=3).map(b"\r\n".join)
PARTS = [b"<a@example.com>", b" ", b"<", b">", b'"', b"BODY=8BITMIME", b"SIZE=1", b"RET=FULL", b"SMTPUTF8"]
PARTS += [b"ORCPT=rfc822;a", b"NOTIFY=NEVER", b"\xc3\xa4", b"\xc3"]
EXTRAS = st.one_of(
    st.tuples(st.sampled_from([b"XFORWARD ", b"XCLIENT "]), NAMING).map(lambda n: n[0] + b" ".join(n[1]) + b"\r\n"),
    st.tuples(st.sampled_from([b"AUTH PLAIN ", b"AUTH PLAIN\r\n", b"AUTH LOGIN\r\n", b"AUTH "]), LOGIN).map(
        lambda a: a[0] + a[1] + b"\r\n"),
    st.binary(max_size=50).map(lambda junk: b"STARTTLS\r\n" + junk),
    st.tuples(st.sampled_from([b"MAIL FROM:", b"RCPT TO:"]), st.lists(st.sampled_from(PARTS), max_size=6)).map(
        lambda m: m[0] + b"".join(m[1]) + b"\r\n"),
)  # fmt: skip
EVERYTHING = st.lists(st.one_of(TALK, EXTRAS, EXTRAS, st.sampled_from(OTHERS)), max_size=8).map(b"".join)

Converse = Callable[[bytes, list[int]], tuple[list[str], list[tuple[str, bytes]]]]


@contextlib.contextmanager
def _serving(redis_url: str, options: dict[str, str]) -> Iterator[Converse]:
    """Yield what to call with what a client sends: the replies, and the mail that the primary took.

    There are no replies where we closed while the client went on talking, for that resets the connection.
    """
    troubles: list[str] = []
    sink = logger.add(lambda record: troubles.append(str(record)), filter=lambda record: "error" in record["message"])
    primary = ScriptedServer(extensions=[*EXTENSIONS, "CHUNKING", "DSN"]).start()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner, contextlib.ExitStack() as ends:
        ends.callback(primary.stop)
        ends.callback(logger.remove, sink)
        server = serve(settings_of(primary.address, options), redis_url)
        _, port = runner.run(server.__aenter__())
        ends.callback(lambda: runner.run(server.__aexit__(None, None, None)))

        def converse(data: bytes, cuts: list[int]) -> tuple[list[str], list[tuple[str, bytes]]]:
            before = len(primary.connections)
            done = {id(t) for c in primary.connections for t in c.transactions}
            heard = runner.run(asyncio.wait_for(_say(port, data, cuts), SECONDS))
            assert not troubles
            assert REPLY.sub(b"", heard) == b"", "not all of it is replies"
            mail = [t for c in primary.connections for t in c.transactions if t.accepted and id(t) not in done]
            if len(primary.connections) > before + 20:
                primary.connections.clear()
            replies = [reply.decode("utf-8") for reply in REPLY.findall(heard)]
            assert not replies or replies[0].startswith("220 ")
            return replies, [(t.sender, t.wire[len(t.trace) :] if t.trace else t.wire) for t in mail]

        yield converse


@pytest.fixture(scope="module", autouse=True)
def quiet() -> None:
    """A line for each of so many messages would be most of the work."""
    logger.remove()


@pytest.fixture(scope="module")
def fuzzing(quiet: None, redis_server: RedisServer) -> Iterator[Converse]:
    """A relay as it is by default."""
    with _serving(redis_server.url, {}) as converse:
        yield converse


@pytest.fixture(scope="module")
def strict(
    quiet: None, redis_server: RedisServer, certificate: Certificate, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Converse]:
    """A relay with users and a certificate that refuses bare line ends."""
    users = tmp_path_factory.mktemp("users") / "users"
    users.write_text(f"ann:{hash_password('correct horse')}\n")
    options = {"smtp.users_file": str(users), "smtp.auth_without_tls": "true", "smtp.bare_newline": "refuse"}
    options |= {"smtp.tls_certificate": str(certificate.certificate), "smtp.tls_key": str(certificate.key)}
    with _serving(redis_server.url, options) as converse:
        yield converse


async def _say(port: int, data: bytes, cuts: list[int]) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    with contextlib.suppress(OSError):
        for start, end in itertools.pairwise(edges):
            writer.write(data[start:end])
            await writer.drain()
            await asyncio.sleep(0)
        writer.write_eof()
    heard = b""
    with contextlib.suppress(OSError):
        heard = await reader.read()
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return heard


FUZZ = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "300")),
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],
)


@FUZZ
@given(data=SENSE, cuts=CUTS)
def test_dialogues(fuzzing: Converse, data: bytes, cuts: list[int]) -> None:
    """The primary takes just the messages that the octets say, octet by octet; every 5xx is a stated rule's."""
    replies, mail = fuzzing(data, cuts)
    meant = _Reader(data).read()
    if not replies or replies[-1].startswith("421 4.7.0"):  # it erred too often, and nobody heard the rest
        meant = meant[: len(mail)]
    assert mail == meant
    assert all(RULES.match(reply) for reply in replies if reply.startswith("5"))


@FUZZ
@given(data=NONSENSE, cuts=CUTS)
def test_streams(fuzzing: Converse, data: bytes, cuts: list[int]) -> None:
    """Any octets at all get replies, or the end; never a traceback, never silence."""
    replies, mail = fuzzing(data, cuts)
    assert all(b"\r\n.\r\n" not in b"\r\n" + body for _, body in mail)
    assert all(RULES.match(reply) for reply in replies if reply.startswith("5"))


@FUZZ
@given(data=EVERYTHING, cuts=CUTS)
def test_logins_and_names(strict: Converse, data: bytes, cuts: list[int]) -> None:
    """The same with AUTH, STARTTLS, XCLIENT and XFORWARD among it, and bare line ends refused."""
    replies, mail = strict(data, cuts)
    assert all(b"\r\n.\r\n" not in b"\r\n" + body for _, body in mail)
    assert not any(re.search(rb"(?<!\r)\n|\r(?!\n)", body) for _, body in mail)
    assert all(MORE_RULES.match(reply) for reply in replies if reply.startswith("5"))
