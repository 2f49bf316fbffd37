"""The test servers themselves: what they record is what was said, and their faults are the faults asked for."""

from __future__ import annotations

import json
import os
import signal
import smtplib
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from support import forked, parallel_run, prepared_process, terminal
from support.dialogue import AsyncDialogue, Dialogue, Unexpected, stuffed
from support.load import smtp_source
from support.postfix_instance import PostfixInstance
from support.product import Product
from support.reactions import Close, Delay, Gate, HalfClose, Reset, Silence, Trickle
from support.running_processes import is_running
from support.scripted_server import ScriptedServer
from support.waiting import free_port, wait_until

Scripted = Callable[..., ScriptedServer]


def test_records_a_transaction_as_it_came(scripted: Scripted):
    """Sender, recipients, parameters and the dot-stuffed body are kept as sent."""
    server = scripted()
    body = b"Received: from x\r\n\tby y\r\nSubject: a\r\n b\r\n\r\n.\r\n..two\r\n\xff\x00\r\n"
    with Dialogue(server.port) as client:
        assert "PIPELINING" in client.hello()
        client.say("MAIL FROM:<a@example.com> BODY=8BITMIME", 250)
        client.say('RCPT TO:<"b> c"@example.com> NOTIFY=NEVER', 250)
        client.body(body)
        client.quit()
    (message,) = server.wait_for(1)
    assert (message.sender, message.parameters) == ("a@example.com", ("BODY=8BITMIME",))
    assert message.recipient_parameters == {'"b> c"@example.com': ("NOTIFY=NEVER",)}
    assert message.body == body
    assert message.wire + b".\r\n" == stuffed(body)
    assert message.content == body[body.index(b"Subject") :]
    assert message.header("subject") == "a b"
    assert server.connections[0].verbs == ["EHLO", "MAIL", "RCPT", "DATA", "QUIT"]
    server.wait_until(lambda: server.connections[0].closed == "quit")


def test_an_empty_message_and_pipelining(scripted: Scripted):
    """A lone dot right after DATA ends the message; commands sent ahead are answered in order."""
    server = scripted()
    with Dialogue(server.port) as client:
        client.send("EHLO x", "MAIL FROM:<>", "RCPT TO:<b@example.com>", "DATA")
        for code in (250, 250, 250, 354):
            client.expect(code)
        client.send(".", "MAIL FROM:<c@example.com>")
        client.expect(250)
        client.expect(250)
    assert server.messages[0].wire == b""
    assert server.messages[0].sender == ""
    assert server.connections[0].pipelined


def test_script_by_command(scripted: Scripted):
    """The longest matching beginning counts; lists go by turn; callables see the line."""
    server = scripted(
        {
            "RCPT TO:<bad@": "550 5.1.1 no\nsuch user",
            "MAIL": ["451 4.3.0 later", None],
            "NOOP": lambda moment: f"250 {len(moment.line)}",
            ".": "552 5.2.2 full",
        }
    )
    with Dialogue(server.port) as client:
        client.hello()
        client.say("MAIL FROM:<a@example.com>", "451 4.3.0")
        client.say("MAIL FROM:<a@example.com>", 250)
        assert client.say("RCPT TO:<bad@example.com>") == "550-5.1.1 no\n550 such user"
        client.say("RCPT TO:<good@example.com>", 250)
        client.say("NOOP 12345", "250 10")
        client.body(b"x\r\n", 552)
    (transaction,) = server.transactions
    assert (transaction.recipients, transaction.refused) == (["good@example.com"], ["bad@example.com"])
    assert not server.messages


@pytest.mark.parametrize("end", [Close(), Reset(), (b"250-half\r\n", Close()), HalfClose()])
def test_ends_at_the_dot(scripted: Scripted, end: object):
    """Whatever way it ends after the dot, the client has no whole reply and the body is recorded."""
    server = scripted({".": end})
    with Dialogue(server.port) as client:
        client.hello()
        with pytest.raises((Unexpected, ConnectionError)):
            client.mail("a@example.com", "b@example.com")
    assert server.transactions[0].wire.endswith(b"text\r\n")


def test_a_gate_holds_the_reply_until_it_is_opened(scripted: Scripted):
    """Order of events without sleeping."""
    gate = Gate()
    server = scripted({".": (gate, None)})
    with Dialogue(server.port) as client:
        client.hello()
        client.say("MAIL FROM:<a@example.com>", 250)
        client.say("RCPT TO:<b@example.com>", 250)
        client.send("DATA", "text", ".")
        client.expect(354)
        gate.wait()
        assert not server.messages
        gate.open()
        client.expect(250)
    assert len(server.messages) == 1


def test_speaks_in_the_middle_of_data(scripted: Scripted):
    """An early reply comes before the dot, and none after it."""
    server = scripted(in_data=(10, ("552 5.3.4 too big", HalfClose())))
    with Dialogue(server.port) as client:
        client.hello()
        client.say("MAIL FROM:<a@example.com>", 250)
        client.say("RCPT TO:<b@example.com>", 250)
        client.say("DATA", 354)
        client.send("x" * 100)
        client.expect(552)
        assert client.is_closed()


def test_silence_and_trickle_meet_the_clients_deadline(scripted: Scripted):
    """A server that accepts and says nothing is seen as such."""
    server = scripted({"CONNECT": [Silence(), Trickle("220 slow", 0.001)], "EHLO": Delay(0.001)})
    with pytest.raises(Unexpected, match="no reply"):
        Dialogue(server.port, timeout=0.1)
    with Dialogue(server.port) as client:
        assert client.greeting == "220 slow"


def test_goes_down_and_comes_back_on_its_port(scripted: Scripted):
    """A restart as a client sees it: connections end, are refused, work again."""
    server = scripted()
    with Dialogue(server.port) as client:
        server.down()
        assert client.is_closed()
    with pytest.raises(ConnectionRefusedError):
        Dialogue(server.port)
    server.listen()
    Dialogue(server.port).close()


def test_too_many_connections_get_421(scripted: Scripted):
    """The limit counts the open ones."""
    server = scripted(max_connections=1)
    with Dialogue(server.port), Dialogue(server.port, greeting=421) as second:
        assert second.is_closed()


def test_lmtp_answers_for_each_recipient(scripted: Scripted):
    """After the dot there is one reply for every accepted recipient, in their order."""
    server = scripted({".<c@example.com>": "452 4.2.2 full"}, lmtp=True)
    with Dialogue(server.port) as client:
        client.say("LHLO x", 250)
        client.mail("a@example.com", "b@example.com", "c@example.com")
        client.expect(452)
    assert server.messages[0].replies == ["250 2.0.0 queued", "452 4.2.2 full"]


def test_tls(scripted: Scripted, certificate):
    """STARTTLS and TLS from the first byte, with a certificate for localhost."""
    server = scripted(tls=certificate.server_context())
    with smtplib.SMTP("127.0.0.1", server.port, timeout=10) as client:
        client.starttls(context=certificate.client_context())
        client.login("user", "secret") if client.has_extn("auth") else None
        client.sendmail("a@example.com", ["b@example.com"], b"Subject: x\r\n\r\ntext\r\n")
    assert server.connections[0].tls
    server = scripted(tls=certificate.server_context(), implicit_tls=True)
    with smtplib.SMTP_SSL("127.0.0.1", server.port, timeout=10, context=certificate.client_context()) as client:
        client.sendmail("a@example.com", ["b@example.com"], b"Subject: x\r\n\r\ntext\r\n")
    assert len(server.messages) == 1


async def test_from_an_event_loop(scripted: Scripted):
    """The same server serves tests that have a loop of their own."""
    server = scripted(extensions=["CHUNKING", "AUTH PLAIN"])
    async with await AsyncDialogue.open(server.port) as client:
        await client.hello()
        await client.say("AUTH PLAIN AHVzZXIAc2VjcmV0", 235)
        await client.say("MAIL FROM:<a@example.com>", 250)
        await client.say("RCPT TO:<b@example.com>", 250)
        await client.raw(b"BDAT 3\r\n.x\r")
        await client.expect(250)
        await client.raw(b"BDAT 4 LAST\r\n\n.y\n")
        await client.expect(250)
    (message,) = await server.arrived(1)
    assert message.wire == b"..x\r\n..y\n"
    assert server.connections[0].login == ("user", "secret")


def test_a_broken_script_fails_the_test():
    """An error inside the server is not swallowed."""
    server = ScriptedServer({"NOOP": object()}).start()
    with Dialogue(server.port) as client:
        client.send("NOOP")
        assert client.is_closed()
    with pytest.raises(AssertionError, match="no reaction"):
        server.stop()


@pytest.mark.postfix
def test_a_postfix_store_keeps_what_it_gets(postfix):
    """What is handed in is in the Maildir below the trace lines, and a front passes mail on to it."""
    store = postfix(PostfixInstance.store())
    front = postfix(PostfixInstance.front(store.port))
    message = b"Subject: caf\xc3\xa9\r\n\r\n.\r\n" + b"x" * 3000 + b"\r\n\xff\r\n"
    front.submit("a@example.org", ["b@example.com"], message)
    (stored,) = store.wait_for(1)
    assert stored.endswith(b"\n" + message.replace(b"\r\n", b"\n"))
    wait_until(lambda: front.queue_empty() and store.queue_empty())


@pytest.mark.postfix
def test_a_postfix_front_keeps_what_cannot_be_sent(postfix):
    """Mail for a dead relay stays in the queue and goes out after a flush."""
    port = free_port()
    front = postfix(PostfixInstance.front(port))
    front.submit("a@example.org", ["b@example.com"], b"Subject: x\r\n\r\ntext\r\n")
    wait_until(lambda: "status=deferred" in front.log)
    assert len(front.queued()) == 1
    with ScriptedServer(port=port) as server:
        front.flush()
        server.wait_for(1)
        wait_until(front.queue_empty)


@pytest.mark.postfix
def test_sink_and_source(smtp_sink):
    """The load programs count the same messages."""
    sink = smtp_sink()
    smtp_source(sink.port, count=50, sessions=5)
    sink.wait_for(50)
    keeping = smtp_sink(keep=True)
    smtp_source(keeping.port, count=3, recipient="c@example.com")
    keeping.wait_for(3)
    wait_until(lambda: all(b"X-Rcpt-Args: <c@example.com>" in message for message in keeping.messages()))


def test_no_two_processes_are_given_the_same_port():
    """What one has been given nobody else gets, until its process ends."""
    program = "from support.waiting import free_port; print([free_port() for _ in range(300)], flush=True); input()"
    command = [sys.executable, "-c", program]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with ExitStack() as ends:
        runs = []
        for _ in range(4):
            run = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            ends.callback(run.communicate, "\n")
            runs.append(run)
        ports = [port for run in runs if run.stdout for port in json.loads(run.stdout.readline())]
        assert len(ports) == len(set(ports)) == 1200
        assert free_port() not in ports


SEEN = """
import json, os, random, sys, time
from pathlib import Path
from loguru import logger
from relay import faultpoints

status = dict(line.split(":\\t", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":\\t" in line)
descriptors = {int(name) for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}")}
seen = {
    "argv": sys.argv[1:],
    "cwd": os.getcwd(),
    "env": {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")},
    "descriptors": sorted(descriptors),
    "leads": os.getsid(0) == os.getpid(),
    "umask": status["Umask"],
    **{name: status[name].strip() for name in ("SigBlk", "SigIgn", "SigCgt", "Threads")},
    "armed": faultpoints.reach.__name__,
    "zone": time.tzname,
    "handlers": len(logger._core.handlers),
    "drawn": random.random(),
}
print(json.dumps(seen), flush=True)
print("told", file=sys.stderr)
sys.exit(3)
"""


def test_a_fork_is_what_a_process_of_its_own_would_be(tmp_path, monkeypatch):
    """Arguments, folder, environment, streams, descriptors, umask, session, signals: a test sees no difference."""
    (tmp_path / "program.py").write_text(SEEN)
    root = str(Path(__file__).parents[2])
    monkeypatch.setenv("PYTHONPATH", root)
    env = {**os.environ, "SMTPDUP_FAULT": "staged:1:/nowhere", "TZ": "Asia/Kathmandu", "GIVEN": "größer"}
    words = [str(tmp_path / "program.py"), "one", "two words"]
    before = os.umask(0o027)
    found = []
    try:
        for number in range(3):
            out, err = tmp_path / f"out-{number}", tmp_path / f"err-{number}"
            with out.open("wb") as stdout, err.open("wb") as stderr:
                if number:
                    process = forked.start(
                        words, cwd=tmp_path, env=env, stdout=stdout, stderr=stderr, start_new_session=True
                    )
                else:
                    process = subprocess.Popen(
                        [sys.executable, *words],
                        cwd=tmp_path,
                        env=env,
                        stdin=subprocess.DEVNULL,
                        stdout=stdout,
                        stderr=stderr,
                        start_new_session=True,
                    )
                assert process.wait(20) == process.poll() == 3
            assert err.read_text() == "told\n"
            found.append(json.loads(out.read_text()))
    finally:
        os.umask(before)
    drawn = {seen.pop("drawn") for seen in found}
    assert found[1] == found[2] == found[0]
    assert found[0]["armed"] == "reach"
    assert len(drawn) == 3


@pytest.mark.parametrize(("name", "status", "seen"), [("_ROSTER_EVERY", 0, "0.25\n"), ("_NO_SUCH", 1, "")])
def test_the_waits_of_a_fork(tmp_path, name, status, seen):
    """They are its own, and one that the product does not have is an error."""
    (tmp_path / "program.py").write_text("from relay.daemon import supervisor\nprint(supervisor._ROSTER_EVERY)\n")
    env = {**os.environ, prepared_process.WAITS: f"relay.daemon.supervisor.{name}=0.25"}
    with (tmp_path / "out").open("w+b") as out, (tmp_path / "err").open("w+b") as err:
        program = [str(tmp_path / "program.py")]
        assert forked.start(program, cwd=tmp_path, env=env, stdout=out, stderr=err).wait(20) == status
    assert (tmp_path / "out").read_text() == seen
    assert (name in (tmp_path / "err").read_text()) == bool(status)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_how_a_fork_has_ended(tmp_path, number):
    """A signal's number, as subprocess tells it; a wait for who goes on is over after its time."""
    (tmp_path / "program.py").write_text("import signal\nprint('up', flush=True)\nsignal.pause()\n")
    with (tmp_path / "out").open("wb") as out:
        process = forked.start([str(tmp_path / "program.py")], cwd=tmp_path, env=os.environ, stdout=out, stderr=out)
    wait_until((tmp_path / "out").read_text)
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.01)
    process.send_signal(number)
    assert process.wait(20) == process.poll() == -number
    process.send_signal(number)  # to nobody


def test_a_command_on_a_terminal_does_not_outlast_its_test(tmp_path, monkeypatch):
    """Whatever ends the wait for it, its process has ended, and what tells of that is closed: no other test sees it."""
    started = []

    def start(*args, **options):
        started.append(forked.start(*args, **options))
        return started[-1]

    monkeypatch.setattr(terminal, "forked", SimpleNamespace(start=start))
    with pytest.raises(UnicodeEncodeError):  # it waits for a password that cannot be typed
        terminal.typed(Product(tmp_path / "product"), "hash-password", answer="\ud800")
    (process,) = started
    assert process.returncode == -signal.SIGKILL
    assert process._answer.fileno() == -1


@pytest.mark.parametrize(
    "last", ["raise ValueError('a fault')", "sys.exit('a fault')", "sys.exit(7)", "sys.exit()", ""]
)
def test_a_fork_ends_as_a_program_does(tmp_path, last):
    """Its status, what its end says, and what it has to do at its end."""
    start = "import atexit, sys\natexit.register(print, 'at exit')\nsys.stdout.write('not flushed ')\n"
    (tmp_path / "program.py").write_text(start + last)
    path = str(tmp_path / "program.py")
    real = subprocess.run([sys.executable, path], capture_output=True, text=True, check=False)
    with (tmp_path / "out").open("w+b") as out, (tmp_path / "err").open("w+b") as err:
        status = forked.start([path], cwd=tmp_path, env=os.environ, stdout=out, stderr=err).wait(20)
    assert status == real.returncode
    assert (tmp_path / "out").read_text() == real.stdout == "not flushed at exit\n"
    assert (tmp_path / "err").read_text().splitlines()[-1:] == real.stderr.splitlines()[-1:]


def test_forks_end_with_the_test_run(tmp_path):
    """Killed, it leaves none behind, nor the process that they are forks of."""
    (tmp_path / "program.py").write_text("import os, signal\nprint(os.getpid(), flush=True)\nsignal.pause()\n")
    run = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom support import forked\n"
        "folder = Path(sys.argv[1])\n"
        "with (folder / 'out').open('wb') as out:\n"
        "    kept = forked.start([str(folder / 'program.py')], cwd=folder, env=os.environ, stdout=out, stderr=out)\n"
        "print(forked._server[1].pid, flush=True)\n"
        "signal.pause()\n"
    )
    folders = (str(Path(__file__).parents[1]), str(Path(__file__).parents[2]))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    command = [sys.executable, "-c", run, str(tmp_path)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as caller:
        assert caller.stdout
        prepared = int(caller.stdout.readline())
        fork = int(wait_until((tmp_path / "out").read_text))
        caller.kill()
    wait_until(lambda: not is_running(fork) and not is_running(prepared))


def test_a_parallel_run_says_why_it_ran_nothing():
    """What the processes that would run the tests keep to themselves: nothing matches; and nothing is there."""
    args = ["-n", "2", "tests/test_repeated.py", "-k", "nothing_is_called_so"]
    given = SimpleNamespace(dir=Path(__file__).parents[2], args=args)
    config: Any = SimpleNamespace(invocation_params=given, option=SimpleNamespace(pyargs=False), args=[args[2]])
    parallel_run.refuse_what_is_not_there(config)
    assert "no tests collected (6 deselected)" in parallel_run.reason_for_nothing(config)
    config.args.append("tests/test_away.py::test_it")
    with pytest.raises(pytest.UsageError, match="not found: tests/test_away"):
        parallel_run.refuse_what_is_not_there(config)
