"""Mail through the product: what `smtp-dup trace` says of it, and that no trouble of the trace delays mail."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from relay.trace import files
from support.product import Product
from support.reactions import Close
from support.scripted_server import ScriptedServer
from support.waiting import wait_until

OLD_SAID, NEW_SAID = "250 2.0.0 Ok: queued as 4XyzAB12", "250 2.0.0 Ok: queued as NEW77abc"


@pytest.fixture
def old() -> Iterator[ScriptedServer]:
    with ScriptedServer({".": OLD_SAID, "RCPT TO:<nobody@": "550 5.1.1 no such user"}) as server:
        yield server


@pytest.fixture
def new() -> Iterator[ScriptedServer]:
    replies = {".": NEW_SAID, "RCPT TO:<zoe@": "550 5.1.1 unknown here", "RCPT TO:<grey@": "451 4.7.1 come back"}
    with ScriptedServer(replies) as server:
        yield server


@pytest.fixture
def product(tmp_path: Path, old: ScriptedServer, new: ScriptedServer) -> Product:
    return Product(
        tmp_path / "product",
        primary=f"old={old.address}",
        backups=[f"new={new.address}"],
        settings={"log.addresses": "true"},
    )


def mail(name: str) -> bytes:
    return f"Message-ID: <{name}@a.example>\r\nSubject: confidential subject\r\n\r\nconfidential text\r\n".encode()


def lives(product: Product, *what: str) -> list[dict[str, Any]]:
    done = product.run("trace", *what, "--json")
    assert done.returncode in (0, 1, 3), done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def until(product: Product, word: str, is_so: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Wait until a message is in the trace as it is to be."""
    found: list[dict[str, Any]] = []

    def look() -> bool:
        found[:] = lives(product, word)
        return len(found) == 1 and is_so(found[0])

    wait_until(look, message=lambda: f"{word}: {found}\n{product.log[-2000:]}", interval=0.2)
    return found[0]


def test_what_becomes_of_mail(product: Product, old: ScriptedServer, new: ScriptedServer) -> None:
    """Delivered, refused by either server, put off, uncertain: told with both servers' words, and no word of a body."""
    with product:
        assert product.send("alice@a.example", "bob@b.example", data=mail("plain"))
        product.send("alice@a.example", "zoe@b.example", "bob@b.example", data=mail("part"))
        product.send("alice@a.example", "grey@b.example", data=mail("grey"))
        with product.dialogue() as client:
            client.hello()
            client.say("MAIL FROM:<alice@a.example>")
            client.say("RCPT TO:<nobody@b.example>", 550)
            client.say("RSET")
            client.quit()
        found = until(product, "<plain@a.example>", lambda life: life["status"] == "delivered")
        assert (found["reply"], found["staged"], found["primary"]) == (OLD_SAID, "redis", "old")
        assert [(c["destination"], c["reply"], c["attempts"]) for c in found["copies"]] == [("new", NEW_SAID, 1)]
        assert [step["who"] for step in found["timeline"]] == ["client", "old", "old", "relay", "old", "new"]
        assert lives(product, "4XyzAB12", "to:bob@b.example")
        found = until(product, "<part@a.example>", lambda life: life["status"] == "failed")
        assert [step["result"] for step in found["timeline"] if step["who"] == "new"] == ["good", "bad"]
        found = until(product, "<grey@a.example>", lambda life: "451" in str(life["copies"]))
        assert found["status"] == "waiting"
        found = until(product, "to:nobody@b.example", lambda life: True)
        assert (found["status"], found["copies"]) == ("refused", [])
        assert found["refused"] == [{"recipient": "nobody@b.example", "reply": "550 5.1.1 no such user", "own": False}]
        old.replies["."] = Close()
        with pytest.raises(Exception, match="451"):
            product.send("alice@a.example", "carl@b.example", data=mail("uncertain"))
        found = until(product, "<uncertain@a.example>", lambda life: life["outcome"] == "uncertain")
        assert found["status"] == "waiting"
        done = product.run("trace", "to:zoe@b.example")
        assert max(map(len, done.stdout.splitlines())) < 400
        assert "on the failed list since" in done.stdout
        assert product.run("trace", "stranger@b.example").returncode == 1
        assert product.run("trace", "from:").returncode == 2
        # The log names the message, and here its recipients.
        accepted = next(event for event in product.events if event["event"] == "accepted")
        assert (accepted["message_id"], accepted["to"]) == ("<plain@a.example>", "<bob@b.example>")
        told = next(event for event in product.events if event["event"] == "delivered" and event["recipients"] == 1)
        assert told["message_id"].endswith("@a.example>")
        assert told["to"].startswith("<")
        # What the primary really said, where an operator looks at a divergence.
        (group,) = [g for g in product.run("divergence", "--json", "--kind", "refused").stdout.splitlines() if g]
        shown = product.run("divergence", "show", json.loads(group)["key"]).stdout
        assert OLD_SAID in shown
    content = b"".join(path.read_bytes() for path in files.folder_of(product.state_dir).iterdir())
    assert b"confidential" not in content


def test_a_trace_that_cannot_be_kept_delays_no_mail(product: Product, new: ScriptedServer) -> None:
    """Housekeeping is stopped, its folder is in the way, its files are damaged: mail goes on, and later the trace."""
    folder = files.folder_of(product.state_dir)
    with product:
        product.send("alice@a.example", "bob@b.example", data=mail("first"))
        until(product, "<first@a.example>", lambda life: True)
        housekeeping = product.child("housekeeping")
        housekeeping.signal(signal.SIGSTOP)
        for n in range(20):
            assert product.send("alice@a.example", "bob@b.example", data=mail(f"stopped{n}"))
        new.wait_for(21)
        housekeeping.signal(signal.SIGCONT)
        until(product, "<stopped19@a.example>", lambda life: life["status"] == "delivered")
        (file,) = files.listed(folder)
        housekeeping.kill()
        for path in file.all_paths:
            path.unlink(missing_ok=True)
        file.path.write_bytes(os.urandom(20_000))
        assert product.send("alice@a.example", "bob@b.example", data=mail("damaged"))
        until(product, "<damaged@a.example>", lambda life: life["status"] == "delivered")
        assert (folder / files.CORRUPT / file.path.name).exists()
        assert "trace file set aside" in product.log
        shutil.rmtree(folder)
        folder.write_text("in the way")
        assert product.send("alice@a.example", "bob@b.example", data=mail("nowhere"))
        product.wait_for_log("mail goes on, its trace is not kept")
        wait_until(lambda: product.metric("smtpdup_trace_dropped_total") >= 1)
        folder.unlink()
        assert product.send("alice@a.example", "bob@b.example", data=mail("again"))
        until(product, "<again@a.example>", lambda life: life["status"] == "delivered")
        assert product.stop() == 0


def test_no_trace(product: Product) -> None:
    """trace.max_bytes = 0: nothing is written, and the command says so. A long path of the state folder is fine."""
    product.settings["trace.max_bytes"] = "0"
    with product:
        product.send("alice@a.example", "bob@b.example", data=mail("plain"))
        product.wait_for_log('"delivered"')
        assert not files.folder_of(product.state_dir).exists()
        done = product.run("trace", "bob@b.example")
        assert (done.returncode, "trace.max_bytes is 0" in done.stdout) == (1, True)
    del product.settings["trace.max_bytes"]
    product.state_dir = product.directory / ("long" * 25) / "state"
    product.settings["state_dir"] = str(product.state_dir)
    with product:
        product.send("alice@a.example", "bob@b.example", data=mail("long"))
        until(product, "<long@a.example>", lambda life: life["status"] == "delivered")
