"""The smtp-dup command: what it says and how it ends, for each kind of right and wrong use."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

import relay
from relay.command import commands
from relay.command.flags import Given
from relay.command.output import Column, Output
from relay.config.options import BACKUP_FIELDS, BACKUP_FLAGS, OPTIONS
from support.dialogue import Unexpected
from support.product import Product
from support.reactions import Close
from support.scripted_server import ScriptedServer
from support.terminal import on_terminal
from support.waiting import free_port, wait_until

REFUSED = "550 5.1.1 no such mailbox"


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line]


# The command line


def test_version(product):
    """`version` and `--version` name the program and its version."""
    instance = product(start=False)
    assert instance.run("version").stdout == instance.run("--version").stdout
    assert instance.run("version").stdout.startswith("smtp-dup ")


@pytest.mark.parametrize("words", [(), ("queue",), ("failed",)])
def test_no_command_is_a_usage_error(product, words):
    """Status 2 and the help, on standard error."""
    done = product(start=False).run(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("Usage: smtp-dup")


def test_the_quick_commands_import_nothing_heavy():
    """`--help` and the listings do not pay for servers, workers and metrics."""
    heavy = ["aiosmtpd", "aiosmtplib", "prometheus_client", "redis", "rich", "rq", "uvloop", "zstandard"]
    script = f"import sys, relay.command.main; sys.exit(', '.join(set({heavy}) & set(sys.modules)) or 0)"
    source = str(Path(relay.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": source}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def given(*words: str) -> Given:
    """Read a command line; return what it gives."""
    task = commands.parse(words)
    assert not isinstance(task, int)
    return task.given


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.key)
def test_every_option_is_a_flag(option):
    """By each of its names, before and after the command; where it is a list, the values add up, else the last wins."""
    for flag in option.flags:
        assert given("up", flag, "x").flags == given(flag, "x", "up").flags == {option.key: "x"}
        assert given(f"{flag}=x", "queue", "list").flags == {option.key: "x"}
    twice = "x,y" if option.kind.several else "y"
    assert given(option.flag, "x", "up", option.flag, "y").flags == {option.key: twice}
    assert "--" + option.key.replace(".", "-").replace("_", "-") in option.flags


@pytest.mark.parametrize("field", BACKUP_FIELDS, ids=lambda field: field.key)
def test_every_field_of_a_backup_is_a_flag(field):
    """NAME=VALUE, for each backup by its name."""
    flag = BACKUP_FLAGS[field.key]
    assert given("up", flag, "new=x=y", f"{flag}=[::1]:25=z").flags == {
        f"backup[new].{field.key}": "x=y", f"backup[[::1]:25].{field.key}": "z"
    }  # fmt: skip
    assert given("up", "--set", f"backup[new].{field.key}=x").flags == {f"backup[new].{field.key}": "x"}
    assert given("up", flag, "x").problems


def test_flags_may_stand_before_and_after_the_command():
    """The later one wins; every --backup counts."""
    words = ["--backup", "a:25", "--listen", ":1", "up", "--listen", ":2", "--backup", "b:25", "--set", "smtp.domain=x"]
    flags = {"relay.destination_backups": "a:25,b:25", "smtp.listen": ":2", "smtp.domain": "x"}
    assert given(*words).flags == flags


# Settings that cannot be used


def test_all_problems_are_told_each_on_its_line(product):
    """Status 2, the key and where it stands, a suggestion for a typo, no traceback; nothing is started."""
    instance = product(start=False)
    done = instance.run("up", "--set", "smtp.max_hopps=3", "--set", "nonsense", "--retry-first", "soon")
    problems = lines(done.stderr)
    assert done.returncode == 2
    assert problems[:2] == [
        "smtp-dup: --set: smtp.max_hopps: unknown option; did you mean smtp.max_hops?",
        "smtp-dup: --set: expected key=value, not 'nonsense'",
    ]
    assert any("--retry-first: retry.first: " in problem for problem in problems)
    assert any("relay.destination_primary: must be given: --primary host:port" in problem for problem in problems)
    assert all(problem.startswith("smtp-dup: ") for problem in problems)
    assert not instance.state_dir.exists()


def test_no_password_is_told(product):
    """A destination that cannot be read is named without its secret."""
    done = product(start=False).run("up", "--primary", "smtp://user:secret@host:port:25")
    assert done.returncode == 2
    assert "secret" not in done.stderr + done.stdout


# What prevents a start


def test_a_port_in_use_is_one_line(product, primary):
    """Status 1, the address, and nothing is left running."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        for key in ("smtp.listen", "status.listen"):
            instance = product(start=False, primary=primary.address, settings={key: f"127.0.0.1:{port}"})
            done = instance.run("up")
            assert done.returncode == 1
            (line,) = lines(done.stderr)
            assert line.startswith(f"smtp-dup: {key}: cannot listen on 127.0.0.1")
            assert str(port) in line
            assert line.endswith("Address already in use")


def test_a_state_folder_in_use_is_one_line(product, primary):
    """Two on one folder: the second one says which process has it."""
    first = product(primary=primary.address)
    second = product(start=False, primary=primary.address, settings={"state_dir": str(first.state_dir)})
    done = second.run("up")
    assert done.returncode == 1
    assert "uses the state folder" in lines(done.stderr)[-1]


def test_a_state_folder_that_cannot_be_made_is_one_line(product, primary, tmp_path):
    """Status 1 and the path."""
    (tmp_path / "file").write_text("")
    instance = product(start=False, primary=primary.address, settings={"state_dir": str(tmp_path / "file")})
    done = instance.run("up")
    assert done.returncode == 1
    (line,) = lines(done.stderr)
    assert line.startswith(f"smtp-dup: state_dir: {tmp_path / 'file'}")


def test_relay_and_workers_need_a_redis(product, primary):
    """Only `up` has a Redis of its own; the others say what to set."""
    for command in ("relay", "workers"):
        done = product(start=False, primary=primary.address).run(command)
        assert done.returncode == 1
        (line,) = lines(done.stderr)
        assert line.startswith(f"smtp-dup: redis.url must be set for `smtp-dup {command}`")


def test_a_redis_that_does_not_answer_ends_the_start(product, primary, monkeypatch):
    """Without a spool: it is waited for, with a line now and then, then one line says so; the password is in none."""
    instance = product(start=False, primary=primary.address, redis_url=f"redis://:secret@127.0.0.1:{free_port()}/0")
    no_spool = ("--spool-dir", "none", "--set", "relay.require_durable_copies=true")
    done = instance.run("relay", "--log-format", "text", *no_spool)
    assert done.returncode == 3
    told = lines(done.stderr)
    assert "waiting for Redis" in told[0]
    assert told[-1].startswith("smtp-dup: redis.url: redis://:***@127.0.0.1:")
    assert "secret" not in done.stderr


# The operator's commands without a Redis


def test_without_redis_a_command_says_what_to_do(product):
    """Status 3 and one line, for the embedded one and for another; every command is in test_help_and_output."""
    words = ("queue", "summary")
    instance = product(start=False)
    done = instance.run(*words)
    assert done.returncode == 3
    (line,) = lines(done.stderr)
    assert line.startswith("smtp-dup: no Redis: set redis.url, or start `smtp-dup up` with this --state-dir")
    done = instance.run(*words, "--redis-url", "redis://:secret@127.0.0.1:1/0")
    assert done.returncode == 3
    (line,) = lines(done.stderr)
    assert line.startswith("smtp-dup: no Redis at redis://:***@127.0.0.1:1/0")


# A running product


@pytest.fixture
def refusing(product: Callable[..., Product], primary: ScriptedServer, backup: ScriptedServer) -> Product:
    """A product with one message in the failed list of its only backup."""
    backup.replies["RCPT TO:<bad@example.com>"] = REFUSED
    instance = product(primary=primary.address, backups=[backup.address])
    instance.send("from@example.com", "bad@example.com", "good@example.com", data=b"Subject: x\r\n\r\n..dot\r\nend\r\n")
    wait_until(lambda: instance.summary()["failed"] == 1, message=lambda: instance.log[-4000:])
    return instance


def test_up_tells_where_everything_is(product, primary, backup):
    """After the start: each listening address, the primary, the backups, the status address."""
    instance = product(primary=primary.address, backups=[backup.address])
    events = {event["event"]: event for event in instance.events}
    assert events["listening"]["smtp"] == instance.address
    assert events["primary"]["address"] == primary.address
    assert events["backup"]["address"] == backup.address
    assert events["status"]["address"] == f"http://127.0.0.1:{instance.status_port}"


def test_ctrl_c_ends_with_0(product, primary):
    """SIGINT drains and is no error."""
    instance = product(primary=primary.address)
    instance.process.send_signal(signal.SIGINT)
    assert instance.wait() == 0
    assert "Traceback" not in instance.log
    assert not (instance.state_dir / "metrics").exists()  # they are in shared memory


def test_summary_has_its_keys(refusing, backup):
    """The keys and numbers that outside checks rely on."""
    row = refusing.summary()
    assert row.items() >= {"destination": backup.address, "pending": 0, "oldest_age_s": 0, "failed": 1}.items()
    assert {"retrying", "delivered"} <= set(row)
    table = refusing.run("queue", "summary").stdout
    assert backup.address in table


def test_list_has_its_keys(product, primary, backup):
    """A deferred copy is listed with what is owed, the last reply, and when it is due."""
    backup.replies["RCPT TO:<later@example.com>"] = "450 4.2.0 later"
    instance = product(primary=primary.address, backups=[backup.address])
    instance.send("from@example.com", "later@example.com", "good@example.com")
    wait_until(lambda: instance.summary()["retrying"] == 1)
    (row,) = instance.json("queue", "list")
    assert set(row) == {
        "id", "destination", "sender", "recipients", "size", "received_at", "attempts", "next_attempt_at", "last_reply"
    }  # fmt: skip
    assert row["recipients"] == ["later@example.com"]
    assert row["last_reply"] == "450 4.2.0 later"
    assert row["next_attempt_at"] > row["received_at"] + 30
    assert row["id"] in instance.run("queue", "list").stdout
    backup.replies.clear()
    assert instance.json("queue", "flush") == [{"flushed": 1}]
    wait_until(lambda: instance.summary()["pending"] == 0)


def test_failed_list_and_show(refusing, backup):
    """A failed copy with just the recipients that were refused, the reply as the reason, and its history."""
    (row,) = refusing.json("failed", "list")
    assert set(row) == {"id", "destination", "sender", "recipients", "size", "reply", "attempts", "failed_at"}
    assert (row["recipients"], row["reply"], row["attempts"]) == (["bad@example.com"], REFUSED, 1)
    assert refusing.json("failed", "list", "--destination", backup.address) == [row]
    (shown,) = refusing.json("failed", "show", row["id"])
    assert shown.items() >= row.items()
    assert [attempt["reply"] for attempt in shown["history"]] == [REFUSED]
    text = refusing.run("failed", "show", row["id"]).stdout
    assert row["id"] in text
    assert REFUSED in text


def test_failed_export_is_the_message(refusing, primary):
    """The .eml on stdout is what the primary got, its dots undone."""
    (row,) = refusing.json("failed", "list")
    done = refusing.run("failed", "export", row["id"])
    assert done.stdout.replace("\r\n", "\n").encode() == primary.messages[0].body.replace(b"\r\n", b"\n")


def test_failed_retry_delivers_when_the_server_has_changed_its_mind(refusing, backup):
    """After a retry just those recipients get the copy, and the list is empty."""
    (row,) = refusing.json("failed", "list")
    backup.replies.clear()
    assert refusing.json("failed", "retry", row["id"]) == [{"retried": 1}]
    wait_until(lambda: refusing.summary()["failed"] == 0 and refusing.summary()["pending"] == 0)
    assert sorted(r for m in backup.messages for r in m.recipients) == ["bad@example.com", "good@example.com"]


def test_failed_drop_asks(refusing):
    """Without a terminal it refuses; with --yes it drops; on a terminal only a yes does."""
    (row,) = refusing.json("failed", "list")
    done = refusing.run("failed", "drop", row["id"], input="y\n")
    assert (done.returncode, lines(done.stderr)) == (2, ["smtp-dup: nobody to ask: say --yes"])
    assert "[y/N]" in on_terminal(refusing, "failed", "drop", row["id"], answer="\n")
    assert refusing.summary()["failed"] == 1
    assert "1 copy dropped" in on_terminal(refusing, "failed", "drop", "--all", answer="y\n")
    assert refusing.summary()["failed"] == 0


def test_unknown_ids_and_destinations_are_one_line(refusing):
    """Status 1, and nothing is changed, also when other ids are right."""
    (row,) = refusing.json("failed", "list")
    for words in (
        ("failed", "show", "nope"),
        ("failed", "export", "nope"),
        ("failed", "retry", row["id"], "nope"),
        ("failed", "drop", row["id"], "nope", "--yes"),
        ("failed", "list", "--destination", "nope"),
        ("queue", "list", "--destination", "nope"),
        ("queue", "flush", "--destination", "nope"),
        ("queue", "move", row["destination"], "nope"),
    ):
        done = refusing.run(*words)
        assert done.returncode == 1, words
        (line,) = lines(done.stderr)
        assert "nope" in line
    assert refusing.json("failed", "list") == [row]


def test_ids_or_all(refusing):
    """Neither and both are refused: nobody retries or drops everything by leaving something out."""
    for words in (("failed", "retry"), ("failed", "drop", "--yes"), ("failed", "retry", "x", "--all")):
        done = refusing.run(*words)
        assert (done.returncode, "--all" in done.stderr) == (2, True)


def test_an_id_is_never_cut(refusing):
    """However narrow the terminal: ids stay whole, other columns fold."""
    (row,) = refusing.json("failed", "list")
    seen = on_terminal(refusing, "failed", "list", columns=60)
    assert row["id"] in seen
    assert "\u2026" not in seen


def test_a_reader_that_goes_away_is_no_traceback(refusing):
    """`smtp-dup failed list | head -0` says nothing."""
    command = f"{sys.executable} -m relay.command check | true"
    done = subprocess.run(
        command, shell=True, env=refusing.environment, cwd=refusing.directory, capture_output=True, check=True
    )
    assert done.stderr == b""


def test_a_long_list_is_shown_in_pages(capsys):
    """As many rows as there are, whatever their number, under one line of titles."""
    Output().rows(range(2500), [Column("number", str)], nothing="none")
    shown = capsys.readouterr().out.split()
    assert [int(word) for word in shown if word.isdigit()] == list(range(2500))
    assert shown.count("number") == 1


def test_what_a_client_says_cannot_steer_the_terminal(capsys):
    """Control characters and markup in addresses are shown, not obeyed."""
    Output(colour="always").rows(["\x1b[2J[red]x[/red]\udcff"], [Column("sender", lambda r: r)], nothing="")
    assert "\\x1b[2J[red]x[/red]\\udcff" in capsys.readouterr().out


# Relay and workers apart


def test_relay_and_workers_apart(product, primary, backup, redis_factory):
    """On a Redis of their own choosing each is ready for itself, and mail goes through both; metrics do not mix."""
    relay = product(command="relay", primary=primary.address, backups=[backup.address], redis_url=redis_factory().url)
    with relay.sibling("workers") as workers:
        relay.send("from@example.com", "to@example.com")
        wait_until(lambda: relay.summary()["delivered"] == 1, message=lambda: workers.log[-4000:])
        assert [m.recipients for m in backup.messages] == [["to@example.com"]]
        assert relay.metric("smtpdup_messages_total", result="accepted") == 1
        assert relay.metric("smtpdup_deliveries_total") == 0
        assert workers.metric("smtpdup_deliveries_total", result="delivered") == 1
        assert "smtpdup_clients" not in workers.get("/metrics")[1]
        assert workers.stop() == 0
    assert relay.get("/readyz")[0] == 200
    assert relay.stop() == 0


@pytest.mark.parametrize(("first", "second"), [("relay", "relay"), ("workers", "workers"), ("up", "relay")])
def test_two_on_one_state_folder_are_refused(product, primary, backup, redis_factory, first, second):
    """They would take each other's mail for that of dead ones, whatever their Redis; later the second may start."""
    url = redis_factory().url
    one = product(command=first, primary=primary.address, backups=[backup.address], redis_url=url)
    other = one.sibling(second)
    other.settings["smtp.listen"] = "127.0.0.1:0"
    other.start(wait=False)
    assert other.wait() == 1
    part = "workers" if second == "workers" else "relay"
    assert re.search(
        rf"another smtp-dup \(process {one.process.pid}\) uses the state folder \S+ for its {part}", other.log
    )
    one.process.kill()
    one.kill()
    again = one.sibling(second)
    again.smtp_port, again.settings["smtp.listen"] = one.smtp_port, one.settings["smtp.listen"]
    with again:
        assert again.stop() == 0


def test_a_redis_that_forgets_is_named_at_the_start(product, primary, redis_factory):
    """The log has a warning for each setting that breaks the promise, and /readyz says no."""
    server = redis_factory(appendfsync="everysec")
    relay = product(command="relay", start=False, primary=primary.address, redis_url=server.url).start(wait=False)
    relay.wait_for_log("relay started")
    (warning,) = [event for event in relay.events if event["event"] == "a copy may be lost"]
    assert warning["about"] == "redis appendfsync"
    code, text = wait_until(lambda: status_of(relay))
    assert code == 503
    assert [reason.split(":")[0] for reason in json.loads(text)["reasons"]] == ["redis appendfsync"]


def status_of(instance: Product) -> tuple[int, str] | None:
    with suppress(OSError):
        return instance.get("/readyz")
    return None


# check


def test_check_is_content_with_what_is_well(product, primary, backup):
    """Status 0; every option with its origin, and a finding for Redis and each server."""
    instance = product(primary=primary.address, backups=[backup.address])
    rows = [json.loads(line) for line in instance.run("check", "--json").stdout.splitlines()]
    settings = {row["key"]: row for row in rows if row["kind"] == "setting"}
    assert settings["smtp.listen"]["value"] == instance.address
    assert "SMTP_DUP_SMTP_LISTEN" in settings["smtp.listen"]["origin"]
    findings = {row["subject"]: row["ok"] for row in rows if row["kind"] == "finding"}
    assert findings.items() >= {"primary": True, f"backup {backup.address}": True, "redis appendfsync": True}.items()
    assert instance.run("check").returncode == 0


def test_check_names_trouble_and_masks_secrets(product, scripted):
    """Status 1; the server that cannot be used is named, its password is not."""
    broken = scripted({"CONNECT": Close()})
    instance = product(start=False, primary=f"smtp://user:secret@{broken.address}?tls=none")
    done = instance.run("check")
    assert done.returncode == 1
    assert "TROUBLE" in done.stdout
    assert "secret" not in done.stdout + done.stderr
    assert "***" in done.stdout


# Destinations that are no longer configured


def test_a_backup_that_was_removed_is_drained(product, primary, scripted):
    """Copies that wait for a backup reach it although the settings no longer name it."""
    old = scripted({"MAIL": "451 4.3.0 later"})
    instance = product(primary=primary.address, backups=[old.address], settings={"retry.first": "1"})
    instance.send("from@example.com", "to@example.com")
    wait_until(lambda: instance.summary()["retrying"] == 1)
    assert instance.stop() == 0
    old.replies.clear()
    instance.settings["relay.destination_backups"] = ""
    instance.start()
    wait_until(lambda: instance.summary()["pending"] == 0, message=lambda: instance.log[-4000:])
    assert [m.recipients for m in old.messages] == [["to@example.com"]]
    assert "no backup any more" in instance.log


# One message that waits, many that are dropped, a retry that is waited for


@pytest.fixture
def deferring(product: Callable[..., Product], primary: ScriptedServer, backup: ScriptedServer) -> Product:
    """A product whose backup `new` defers three messages: two to one domain, one to another."""
    for user in ("one@a.example", "two@a.example", "three@b.example"):
        backup.replies[f"RCPT TO:<{user}>"] = "450 4.2.0 later"
    instance = product(primary=primary.address, files={
        "settings.toml": f'[[backup]]\nname = "new"\nurl = "{backup.address}"\n'
    })  # fmt: skip
    instance.send("from@example.com", "one@a.example")
    instance.send("other@example.com", "two@a.example")
    instance.send("from@example.com", "three@b.example")
    wait_until(lambda: instance.summary()["retrying"] == 3, message=lambda: instance.log[-4000:])
    return instance


def test_one_that_waits_is_shown(deferring):
    """What is owed to whom, where it came from, and each attempt; an id that does not wait is status 1."""
    row = next(row for row in deferring.json("queue", "list") if row["recipients"] == ["one@a.example"])
    (shown,) = deferring.json("queue", "show", row["id"])
    assert shown.items() >= row.items()
    assert shown["client_address"] == "127.0.0.1"
    assert [attempt["reply"] for attempt in shown["history"]] == ["450 4.2.0 later"]
    assert "450 4.2.0 later" in deferring.run("queue", "show", row["id"]).stdout
    done = deferring.run("queue", "show", "nope")
    assert (done.returncode, lines(done.stderr)) == (1, ["smtp-dup: does not wait: nope"])


def test_what_waits_is_dropped_by_filter(deferring):
    """Every filter must match; a dry run changes nothing; without a word of agreement nothing goes."""
    assert deferring.run("queue", "drop").returncode == 2
    assert deferring.run("queue", "drop", "x", "--all").returncode == 2
    assert deferring.run("queue", "drop", "--older-than", "soon").returncode == 2
    assert deferring.run("queue", "drop", "nope", "--yes").returncode == 1
    assert deferring.json("queue", "drop", "--older-than", "1h", "--yes") == [{"would_drop": 0, "bytes": 0}]
    (row,) = deferring.json("queue", "drop", "--to", "@A.example", "--from", "from@example.com", "--dry-run")
    assert row["would_drop"] == 1
    done = deferring.run("queue", "drop", "--to", "@a.example", input="y\n")
    assert (done.returncode, lines(done.stderr)) == (2, ["smtp-dup: nobody to ask: say --yes"])
    assert "[y/N]" in on_terminal(deferring, "queue", "drop", "--to", "@a.example", answer="n\n")
    assert deferring.summary()["pending"] == 3
    assert deferring.json("queue", "drop", "--to", "@a.example", "--yes") == [{"dropped": 2}]
    assert [row["recipients"] for row in deferring.json("queue", "list")] == [["three@b.example"]]
    assert "1 copy dropped" in on_terminal(deferring, "queue", "drop", "--all", answer="y\n")
    assert deferring.summary()["pending"] == 0


def test_a_retry_says_what_became_of_it(refusing, backup):
    """With --wait: failed again is status 1, with the reply; delivered is 0."""
    (row,) = refusing.json("failed", "list")
    backup.replies["RCPT TO:<bad@example.com>"] = "550 5.1.1 still not"
    done = refusing.run("failed", "retry", row["id"], "--wait", "--json")
    assert done.returncode == 1
    count, outcome = map(json.loads, lines(done.stdout))
    assert count == {"retried": 1}
    assert outcome == {
        "id": row["id"], "destination": row["destination"], "outcome": "failed", "reply": "550 5.1.1 still not"
    }  # fmt: skip
    backup.replies.clear()
    done = refusing.run("failed", "retry", "--all", "--wait")
    assert done.returncode == 0
    assert "delivered" in done.stdout


def test_uncertain_messages_are_listed(product, scripted, backup):
    """The primary goes away at the dot: the message is in no queue yet, and `queue list --uncertain` has it."""
    primary = scripted({".": Close()})
    instance = product(primary=primary.address, backups=[backup.address])
    with pytest.raises(Unexpected, match=r"451 4\.4\.2"):
        instance.send("from@example.com", "to@example.com")
    (row,) = wait_until(lambda: instance.json("queue", "list", "--uncertain"))
    assert (row["sender"], row["recipients"]) == ("from@example.com", ["to@example.com"])
    assert row["copied_at"] > row["received_at"] + 3000
    assert row["id"] in instance.run("queue", "list", "--uncertain").stdout
    assert instance.json("queue", "list") == []
    assert instance.run("queue", "list", "--uncertain", "--destination", backup.address).returncode == 2


@pytest.mark.parametrize(
    "words", [("queue", "show"), ("queue", "retry"), ("failed", "show"), ("hold", "--reason"), ("trace",), ("route",)]
)
def test_arguments_that_are_no_utf_8(
    product: Callable[..., Product], primary: ScriptedServer, backup: ScriptedServer, words: tuple[str, ...]
) -> None:
    """They are said to be wrong, or stand for nothing that is there: a terminal may have another encoding."""
    running = product(primary=primary.address, backups={"new": backup.address})
    done = subprocess.run(
        [sys.executable, "-m", "relay.command", *words, b"\xff@example.com"],
        cwd=running.directory,
        env=running.environment,
        capture_output=True,
        timeout=30,
        check=False,
    )
    assert done.returncode in {0, 1, 2}
    assert b"Traceback" not in done.stderr
