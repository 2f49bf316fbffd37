"""compose.yaml, run for real: two variables relay mail, and what breaks comes back with everything promised.

By hand, or where there is an engine: `pytest tests/compose`. The first run builds the images.
"""

from __future__ import annotations

import base64
import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from support import compose_stack
from support.compose_stack import Stack, named, outside
from support.reactions import Gate
from support.scripted_server import ScriptedServer
from support.waiting import wait_until

pytestmark = [pytest.mark.compose, pytest.mark.timeout(900)]

SERVICES = ("redis", "relay", "workers", "dashboard")
LOGIN = "admin:correct horse"


@pytest.fixture(scope="module")
def ends() -> Iterator[ExitStack]:
    if reason := compose_stack.unavailable():
        pytest.skip(reason)
    with ExitStack() as stack:
        yield stack


@pytest.fixture(scope="module")
def primary(ends: ExitStack) -> ScriptedServer:
    server = compose_stack.server()
    ends.callback(server.stop)
    return server


@pytest.fixture(scope="module")
def backup(ends: ExitStack) -> ScriptedServer:
    server = compose_stack.server()
    ends.callback(server.stop)
    return server


@pytest.fixture(scope="module")
def started(
    ends: ExitStack, primary: ScriptedServer, backup: ScriptedServer, tmp_path_factory: pytest.TempPathFactory
) -> Stack:
    variables = {
        "SMTP_DUP_RELAY_DESTINATION_PRIMARY": outside(primary),
        "SMTP_DUP_RELAY_DESTINATION_BACKUPS": outside(backup),
        "SMTP_DUP_RETRY_FIRST": "1s",
        "SMTP_DUP_SPOOL_MIN_FREE": "1M",
        "DASHBOARD_PASSWORD": LOGIN.partition(":")[2],
    }
    stack = Stack(tmp_path_factory.mktemp("compose"), variables)
    ends.callback(stack.remove)
    stack.compose("build", timeout=compose_stack.BUILD_SECONDS)
    return stack


@pytest.fixture
def stack(started: Stack, primary: ScriptedServer, backup: ScriptedServer) -> Iterator[Stack]:
    """The stack, running and healthy; the servers accept everything."""
    started.up()
    yield started
    primary.replies.clear()
    backup.replies.clear()


def arrives(backup: ScriptedServer, subject: str, seconds: float = 60) -> None:
    backup.wait_until(lambda: named(backup, subject), seconds, f"the copy of {subject!r}")


def test_two_variables_relay_mail(stack: Stack, primary: ScriptedServer, backup: ScriptedServer) -> None:
    """With the primary and the backup named, mail to the published port reaches both, the same octets."""
    stack.send("first", "one@example.org", "two@example.org")
    arrives(backup, "first")
    (kept,), (copy,) = named(primary, "first"), named(backup, "first")
    assert kept.recipients == copy.recipients == ["one@example.org", "two@example.org"]
    assert kept.content == copy.content
    assert b"\r\n.\r\n..and its end\r\n" in copy.content
    wait_until(lambda: stack.summary()["pending"] == 0, message="nothing pending")


def test_without_a_primary_it_says_what_is_missing(started: Stack) -> None:
    """No variable, no start: one line names the variable and gives an example."""
    done = started.run("config", "--quiet", shell={"SMTP_DUP_RELAY_DESTINATION_PRIMARY": ""})
    assert done.returncode != 0
    assert re.search(r"SMTP_DUP_RELAY_DESTINATION_PRIMARY.*old\.example\.com:25", done.stderr)


def test_settings_come_from_env_file_and_shell(stack: Stack) -> None:
    """What stands in .env is passed on; so is what the shell sets."""
    shown = stack.compose("exec", "--no-TTY", "relay", "smtp-dup", "check")
    assert re.search(r"retry\.first\s+1s?\s+SMTP_DUP_RETRY_FIRST", shown)
    done = stack.run("config", "--format", "json", shell={"SMTP_DUP_LOG_FORMAT": "json"})
    services = json.loads(done.stdout)["services"]
    assert [services[name]["environment"]["SMTP_DUP_LOG_FORMAT"] for name in ("relay", "workers")] == ["json"] * 2


def test_a_mistyped_variable_is_named(started: Stack) -> None:
    """A variable in .env that is no option ends the start with status 2 and the nearest name."""
    file = started.directory / ".env"
    before = file.read_text()
    file.write_text(before + "SMTP_DUP_RETRY_FRIST=5s\n")
    try:
        done = started.run("run", "--rm", "--no-TTY", "--no-deps", "relay", "check")
    finally:
        file.write_text(before)
    assert done.returncode == 2
    assert "did you mean SMTP_DUP_RETRY_FIRST" in done.stdout + done.stderr


@pytest.mark.parametrize("service", SERVICES)
def test_a_container_can_do_little(stack: Stack, service: str) -> None:
    """Not root, no capability, none to be gained, nothing to write but its volumes and /tmp, bounded, restarted."""
    host = stack.container(service)["HostConfig"]
    assert host["ReadonlyRootfs"]
    assert host["CapDrop"] == ["ALL"]
    assert host["Memory"] > 0
    assert host["PidsLimit"] > 0
    assert host["RestartPolicy"]["Name"] == "unless-stopped"

    def inside(command: str) -> str:
        return stack.compose("exec", "--no-TTY", service, "sh", "-c", command)

    assert inside("id -u") != "0"
    status = dict(line.split(":\t", 1) for line in inside("cat /proc/1/status").splitlines() if ":\t" in line)
    assert (int(status["CapEff"], 16), int(status["CapBnd"], 16), status["NoNewPrivs"]) == (0, 0, "1")
    assert inside("touch /bin/x /usr/x /x 2>/dev/null || echo no") == "no"
    assert inside("touch /tmp/x && rm /tmp/x && echo yes") == "yes"


def test_only_three_ports_are_published_and_to_this_machine_only(stack: Stack) -> None:
    """Those of mail, the page and the dashboard, on 127.0.0.1; Redis is in the network that leads nowhere."""
    published = {name: stack.container(name)["HostConfig"]["PortBindings"] or {} for name in SERVICES}
    assert {name: sorted(ports) for name, ports in published.items() if ports} == {
        "relay": ["2525/tcp", "8025/tcp"],
        "dashboard": ["9181/tcp"],
    }
    bindings = [binding for ports in published.values() for found in ports.values() for binding in found]
    assert {binding["HostIp"] for binding in bindings} == {"127.0.0.1"}
    networks = list(stack.container("redis")["NetworkSettings"]["Networks"])
    assert networks == [f"{stack.name}_ledger"]
    assert compose_stack.docker("network", "inspect", networks[0], "--format", "{{.Internal}}") == "true"


def test_redis_keeps_its_promises(stack: Stack) -> None:
    """Redis is set as the 250 to the client needs it, and /readyz has found nothing to complain about."""
    for name, value in (
        ("appendonly", "yes"), ("appendfsync", "always"), ("no-appendfsync-on-rewrite", "no"),
        ("maxmemory-policy", "noeviction"), ("hash-max-listpack-value", "4096"),
    ):  # fmt: skip
        found = stack.compose("exec", "--no-TTY", "redis", "redis-cli", "--raw", "config", "get", name)
        assert found.splitlines() == [name, value]
    for service in ("relay", "workers"):
        assert stack.compose("exec", "--no-TTY", service, "smtp-dup-health") == "/readyz: 200"


def test_a_killed_redis_comes_back_with_every_copy(
    stack: Stack, primary: ScriptedServer, backup: ScriptedServer
) -> None:
    """SIGKILL while copies wait: it starts again by itself, and each copy arrives, once."""
    backup.replies["RCPT"] = "451 4.7.1 later"
    for n in range(5):
        stack.send(f"before {n}")
    stack.kill("redis")
    for n in range(5):
        stack.send(f"after {n}")  # Redis or the spool: the client need not know
    backup.replies.clear()
    for subject in [f"{when} {n}" for when in ("before", "after") for n in range(5)]:
        assert len(named(primary, subject)) == 1
        arrives(backup, subject, 120)
        assert len(named(backup, subject)) == 1
    wait_until(lambda: stack.summary()["pending"] == 0, 60, "nothing pending", interval=0.5)


@pytest.mark.parametrize("service", ["relay", "workers"])
def test_a_killed_container_starts_again(stack: Stack, backup: ScriptedServer, service: str) -> None:
    """SIGKILL for all of the relay or the workers: both legs work again within seconds, and nothing went missing."""
    backup.replies["RCPT"] = "451 4.7.1 later"
    stack.send(f"{service} before")
    stack.kill(service)
    stack.wait_healthy(service)
    backup.replies.clear()
    stack.send(f"{service} after")
    for subject in (f"{service} before", f"{service} after"):
        arrives(backup, subject, 120)
        assert len(named(backup, subject)) == 1


def test_workers_killed_in_the_middle_of_a_delivery(stack: Stack, backup: ScriptedServer) -> None:
    """SIGKILL while the backup has not answered yet: the new container delivers that copy as soon as it runs."""
    gate = Gate()
    backup.replies["."] = [(gate, None), None]
    stack.send("in hand")
    gate.wait(60)
    stack.kill("workers")
    arrives(backup, "in hand", 30)
    wait_until(lambda: stack.summary()["pending"] == 0, 30, "nothing pending", interval=0.5)
    gate.open()


def test_requeue_in_the_dashboard_delivers_the_copy(stack: Stack, backup: ScriptedServer) -> None:
    """A refused copy is shown with the server's reply; Requeue, as its page asks for it, delivers it."""
    backup.replies["RCPT"] = "550 5.1.1 no <b>such</b> user"
    stack.send("refused")
    wait_until(lambda: stack.summary()["failed"] == 1, message="a failed copy")
    queue = f"backup-{outside(backup)}"
    status, text = stack.dashboard(f"/0/data/jobs/{queue}/failed/8/asc/1.json", login=LOGIN)
    (job,) = json.loads(text)["jobs"]
    assert (status, job["exc_info"]) == (200, "550 5.1.1 no <b>such</b> user")
    status, text = stack.dashboard(f"/0/data/job/{job['id']}.json", login=LOGIN)
    assert (status, json.loads(text)["status"]) == (200, "failed")
    status, text = stack.dashboard(f"/0/view/job/{job['id']}", login=LOGIN)
    assert status == 200
    assert "<%- d.exc_info %>" in text, "a reply is shown as text, never as HTML"

    backup.replies.clear()
    requeue = f"/job/{job['id']}/requeue"
    assert stack.dashboard(requeue, post=True)[0] == 401
    elsewhere = {"Origin": "http://elsewhere.example", "Sec-Fetch-Site": "cross-site"}
    assert stack.dashboard(requeue, post=True, login=LOGIN, headers=elsewhere)[0] == 403
    assert stack.dashboard(requeue, post=True, login=LOGIN) == (200, '{"status":"OK"}\n')
    arrives(backup, "refused")
    wait_until(lambda: (stack.summary()["failed"], stack.summary()["pending"]) == (0, 0), message="none failed")
    assert stack.dashboard(requeue, post=True, login=LOGIN)[0] in {404, 409}
    assert len(named(backup, "refused")) == 1


def test_the_dashboard_while_a_job_runs(stack: Stack, backup: ScriptedServer) -> None:
    """Every tab answers, also while a worker is in the middle of a job; what deletes is off."""
    gate = Gate()
    backup.replies["."] = (gate, None)
    # What a job is needed for: too large, also when it is compressed, for a first try from memory.
    stack.send("slow", more=base64.encodebytes(os.urandom(96 << 10)).decode().replace("\n", "\r\n"))
    gate.wait(60)
    try:
        for path in ("/", "/0/view/jobs", "/0/view/workers", "/0/data/queues.json", "/favicon.ico"):
            assert stack.dashboard(path, login=LOGIN)[0] == 200, path
        status, text = stack.dashboard("/0/data/workers.json", login=LOGIN)
        assert status == 200
        (job,) = [w["current_job"] for w in json.loads(text)["workers"] if w["current_job"] != "idle"]
        assert job["call_string"].startswith(f"1 message to {outside(backup)}")
        for registry in ("queued", "started", "scheduled", "failed"):
            path = f"/0/data/jobs/backup-{outside(backup)}/{registry}/8/dsc/1.json"
            assert stack.dashboard(path, login=LOGIN)[0] == 200, registry
        path = f"/queue/backup-{outside(backup)}/started/empty"
        assert stack.dashboard(path, post=True, login=LOGIN) == (200, '{"status":"DISABLED"}\n')
    finally:
        gate.open()
    arrives(backup, "slow")


def test_the_dashboard_needs_its_password(stack: Stack) -> None:
    """No page, no script and no data without it; the health check alone is open, and says nothing."""
    for path in ("/", "/0/data/queues.json", "/static/js/underscore-umd-min.js", "/requeue/x"):
        assert stack.dashboard(path)[0] == 401, path
        assert stack.dashboard(path, login="admin:wrong")[0] == 401, path
    assert stack.dashboard("/healthz") == (200, "ok\n")
    assert stack.dashboard("/requeue/x", login=LOGIN)[0] == 405


def test_stop_waits_for_the_message_in_flight(stack: Stack, primary: ScriptedServer, backup: ScriptedServer) -> None:
    """A client that waits for the primary's answer while the stack is stopped gets it; all end with status 0."""
    gate = Gate()
    primary.replies["."] = (gate, None)
    outcome: list[BaseException | None] = []

    def send() -> None:
        try:
            stack.send("in flight")
            outcome.append(None)
        except BaseException as error:
            outcome.append(error)

    sender = threading.Thread(target=send)
    sender.start()
    gate.wait(60)
    stopping = threading.Thread(target=stack.compose, args=("stop",))
    stopping.start()
    # The port is closed as soon as the relay drains, and the message is still on its way.
    wait_until(lambda: "stopping" in stack.run("logs", "relay").stdout, 60, "the relay is told to stop", interval=0.2)
    assert stopping.is_alive()
    gate.open()
    sender.join(60)
    stopping.join(120)
    assert outcome == [None]
    assert [stack.container(name)["State"]["ExitCode"] for name in SERVICES] == [0] * 4
    stack.up()
    arrives(backup, "in flight")
    assert len(named(backup, "in flight")) == len(named(primary, "in flight")) == 1


def test_copies_outlive_their_containers(stack: Stack, backup: ScriptedServer) -> None:
    """`down` and `up` make new containers; the copies are in the volumes."""
    backup.replies["RCPT"] = "451 4.7.1 later"
    stack.send("patient")
    wait_until(lambda: stack.summary()["retrying"] == 1, message="the copy waits")
    stack.compose("down")
    backup.replies.clear()
    stack.up()
    arrives(backup, "patient")
    assert len(named(backup, "patient")) == 1
