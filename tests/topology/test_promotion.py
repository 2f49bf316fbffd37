"""A promotion and its undo while mail goes on: who answers changes, nothing is lost, and each trouble is told."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable

import pytest
import redis

from relay.config import loader
from relay.config.loader import Settings
from relay.ledger import keys
from relay.topology import decisions, followers, promotion, remembered
from relay.topology.promotion import Impossible, Plan, Unprepared
from relay.topology.state import Topology
from support.drained import is_drained
from support.product import SOON, Product
from support.reactions import Reset
from support.redis_servers import RedisServer
from support.retrying_sender import Sender
from support.scripted_server import ScriptedServer
from support.waiting import wait_until

WAITS = SOON

FORCED = ("--yes", "--force", "--reason", "test")
SETTINGS = {"retry.first": "1", "relay.timeout_seconds": "2", "relay.uncertain_hold": "1"}
Make = Callable[..., Product]


def pair(product: Make, old: ScriptedServer, new: ScriptedServer, **options: object) -> Product:
    """Return a product with a primary called old and a backup called new."""
    settings = {**SETTINGS, **options.pop("settings", {})}
    return product(primary=f"old={old.address}", backups=[f"new={_url(new)}"], settings=settings, **options)


def _url(server: ScriptedServer) -> str:
    return f"lmtp://{server.address}" if server.lmtp else server.address


def settings_of(made: Product) -> Settings:
    return loader.load(environ=made.environment, directories=())


def nothing(_: str) -> None:
    """Report to nobody."""


def promoted(client: redis.Redis, made: Product, name: str) -> Plan:
    """Promote in the way of --now; returns the plan once everybody follows."""
    plan = promotion.plan(client, settings_of(made), name)
    promotion.commit(client, plan, "test", {}, None)
    assert followers.follow(client, plan, 30, nothing).is_whole
    return plan


def subjects(server: ScriptedServer) -> list[str]:
    return [m.header("Subject") or "" for m in server.messages]


def send(made: Product, subject: str) -> None:
    made.send("a@example.com", "b@example.com", data=f"Subject: {subject}\r\n\r\n{subject}\r\n".encode())


# As an operator sees it -------------------------------------------------------------------------------------------


def test_a_promotion_and_its_undo(product: Make, scripted: Callable[..., ScriptedServer]) -> None:
    """The new server's replies are the client's, the old one gets copies with the null sender; and back."""
    old, new = scripted(), scripted(extensions=["PIPELINING", "SIZE 77777777"])
    both = pair(product, old, new, settings={"smtp.processes": "2"})
    send(both, "one")
    new.wait_for(1)
    assert both.run("topology").returncode == 0

    dry = both.run("promote", "new", "--dry-run")
    assert dry.returncode == 1, "readiness is not known"
    assert "epoch        0 -> 1" in dry.stdout
    assert both.run("promote", "new", "--yes").returncode == 1
    assert both.run("promote", "new", "--force", "--yes").returncode == 2, "a reason is wanted"
    assert both.run("promote", "new", "--force", "--reason", "x").returncode == 2, "nobody to ask"
    assert both.run("promote", "knew", *FORCED).returncode == 2
    assert both.run("undo", "--yes").returncode == 1, "nothing to undo"
    assert decisions_of(both) is None

    done = both.run("promote", "new", *FORCED)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 of 2 processes" in done.stdout
    with both.dialogue() as client:
        assert client.hello()["SIZE"] == "77777777"
    send(both, "two")
    assert subjects(new) == ["one", "two"]
    old.wait_for(2)
    assert old.messages[-1].sender == "", "a demoted server has nobody to bounce to"
    assert [t.sender for t in new.messages] == ["a@example.com"] * 2

    status = both.json("topology")
    assert (status[0]["epoch"], status[0]["primary"], status[0]["settings_agree"]) == (1, "new", False)
    assert all(row["follows"] for row in status if row["kind"] == "process")
    assert "although the settings name old" in both.run("check").stdout
    ready = json.loads(both.get("/readyz")[1])
    assert ready["ready"]
    assert not ready["warnings"]
    assert both.metric("smtpdup_topology_epoch") == 1
    assert both.metric("smtpdup_topology_followers") == both.metric("smtpdup_relays") == 2
    assert both.metric("smtpdup_role", destination="new", role="primary") == 1

    assert both.run("promote", "new", "--yes").returncode == 0, "nothing to do"
    assert decisions_of(both).epoch == 1
    back = both.run("undo", "--yes", "--reason", "enough")
    assert back.returncode == 0, back.stdout + back.stderr
    send(both, "three")
    assert subjects(old)[-1] == "three"
    new.wait_for(3)
    (first, second) = both.json("audit")
    assert (first["command"], first["before"], first["after"], first["reason"]) == ("undo", "new", "old", "enough")
    assert (second["command"], second["reason"], second["details"]["forced"]) == ("promote", "test", "yes")
    assert both.stop() == 0


def decisions_of(made: Product) -> Topology | None:
    with redis.Redis.from_url(made.redis_url) as client:
        return decisions.topology(client)[0]


def test_a_message_under_way_ends_where_it_began(product: Make, scripted: Callable[..., ScriptedServer]) -> None:
    """It keeps its primary and its copy until its end; then the last connection is closed with a QUIT."""
    old, new = scripted(), scripted()
    both = pair(product, old, new)
    with both.dialogue() as begun, both.dialogue() as greeted, redis.Redis.from_url(both.redis_url) as client:
        begun.hello()
        greeted.hello()
        begun.say("MAIL FROM:<a@example.com>", 250)
        begun.say("RCPT TO:<b@example.com>", 250)
        done = both.run("promote", "new", *FORCED, "--wait", "4s")
        assert done.returncode == 0, done.stdout + done.stderr
        assert "At old until its end: 1 message" in done.stdout
        greeted.mail("a@example.com", "b@example.com", data=b"Subject: other\r\n\r\nx\r\n")
        begun.body(b"Subject: mine\r\n\r\nx\r\n")
        assert subjects(new)[0] == "other"
        assert "mine" in subjects(old)  # perhaps behind its copy of the other one
        new.wait_for(2)
        old.wait_for(2)
        wait_until(lambda: not any(beat.in_old for beat in decisions.view(client).beats))
        wait_until(lambda: old.connections[0].closed)
        assert old.connections[0].commands[-1].upper().startswith("QUIT")
        begun.mail("a@example.com", "b@example.com", data=b"Subject: next\r\n\r\nx\r\n")
        assert sorted(subjects(new)) == ["mine", "next", "other"]


def test_a_session_keeps_what_it_was_offered(product: Make, scripted: Callable[..., ScriptedServer]) -> None:
    """A parameter that the new primary lacks is answered as for two unequal nodes: no refusal where none is needed."""
    old, new = scripted(), scripted(extensions=[])
    both = pair(product, old, new)
    with both.dialogue() as client, redis.Redis.from_url(both.redis_url) as connection:
        assert "SIZE" in client.hello()
        promoted(connection, both, "new")
        client.say("MAIL FROM:<a@example.com> SIZE=100 BODY=7BIT", 250)
        client.say("RSET", 250)
        client.say("MAIL FROM:<\u00e4@example.com> SMTPUTF8", 451)
        extensions = client.hello()
        assert "SMTPUTF8" not in extensions
        client.mail("a@example.com", "b@example.com")


def test_an_lmtp_server_is_promoted(product: Make, scripted: Callable[..., ScriptedServer]) -> None:
    """It takes a message for one recipient at a time, and the client is told to come again for the others."""
    old, new = scripted(), scripted(lmtp=True)
    both = pair(product, old, new)
    assert "one recipient at a time" in both.run("promote", "new", *FORCED).stdout
    with both.dialogue() as client:
        client.hello()
        client.say("MAIL FROM:<a@example.com>", 250)
        client.say("RCPT TO:<b@example.com>", 250)
        client.say("RCPT TO:<c@example.com>", 452)
        client.body(b"Subject: x\r\n\r\nx\r\n")


# What prevents it -------------------------------------------------------------------------------------------------


def test_a_server_that_cannot_be_used_is_not_promoted(product: Make, scripted: Callable[..., ScriptedServer]) -> None:
    """Prepare opens a connection as for mail: down, or without what the settings ask for, nothing has changed."""
    old, new = scripted(), scripted({"EHLO": "550 5.7.1 not you", "HELO": "550 5.7.1 not you"})
    both = pair(product, old, new, settings={"smtp.processes": "2"})
    refused = both.run("promote", "new", *FORCED)
    assert refused.returncode == 1
    assert refused.stdout.count("cannot be used") == 2
    assert "nothing has changed" in refused.stderr
    new.replies.clear()
    new.down()
    gone = both.run("promote", "new", *FORCED, "--json")
    assert gone.returncode == 1
    assert decisions_of(both) is None
    with redis.Redis.from_url(both.redis_url) as client:
        assert not client.exists(keys.INTENT)
    send(both, "still old")
    assert subjects(old) == ["still old"]
    assert not both.json("audit")
    new.listen()
    assert both.run("promote", "new", *FORCED).returncode == 0


def test_undo_now_asks_nobody(product: Make, scripted: Callable[..., ScriptedServer]) -> None:
    """The new server burns, the old one does not answer at this moment either: --now goes back all the same."""
    old, new = scripted(), scripted()
    both = pair(product, old, new)
    assert both.run("promote", "new", *FORCED).returncode == 0
    old.down()
    assert both.run("undo", "--yes", "--wait", "4s").returncode == 1
    assert decisions_of(both).primary == "new"
    back = both.run("undo", "--now", "--yes")
    assert back.returncode == 0, back.stderr
    old.listen()
    send(both, "back")
    assert subjects(old)[-1] == "back"


def test_a_server_for_some_domains_only(product: Make, scripted: Callable[..., ScriptedServer]) -> None:
    """Whoever is to answer must take everything: its settings say that it does not."""
    old, new = scripted(), scripted()
    table = f'[[backup]]\nname = "new"\nurl = "{new.address}"\ndomains = ["example.com"]\n'
    both = product(primary=f"old={old.address}", settings=SETTINGS, files={"settings.toml": table})
    refused = both.run("promote", "new", *FORCED)
    assert (refused.returncode, "domains" in refused.stderr) == (2, True)


def test_a_relay_that_does_not_know_the_server(
    product: Make, scripted: Callable[..., ScriptedServer], redis_url: str, redis_client: redis.Redis
) -> None:
    """Prepare names it; promoted all the same it goes on with the old one, says so, and its mail is copied."""
    old, new = scripted(), scripted()
    knows = pair(product, old, new, command="relay", redis_url=redis_url)
    strange = product(
        primary=f"old={old.address}", backups=[f"other={new.address}"], command="relay", redis_url=redis_url
    )
    refused = knows.run("promote", "new", *FORCED)
    assert refused.returncode == 1
    assert "do not name new" in refused.stdout
    done = knows.run("promote", "new", "--now", *FORCED, "--wait", "2s")
    assert done.returncode == 1
    assert "has not followed" in done.stdout
    send(strange, "late")
    assert subjects(old) == ["late"]
    assert redis_client.zcard(keys.PENDING + "other") == 1
    warnings = json.loads(strange.get("/readyz")[1])["warnings"]
    assert any("do not name new" in warning for warning in warnings)
    assert knows.run("topology").returncode == 1


def test_what_stands_in_redis_is_data(product: Make, scripted: Callable[..., ScriptedServer]) -> None:
    """Nonsense, another type of key, a far too high epoch: mail goes on as before, and the next promotion works."""
    old, new = scripted(), scripted()
    both = pair(product, old, new)
    with redis.Redis.from_url(both.redis_url) as client:
        for value in (b"\xff\xfe", b"[" * 10_000, b'{"epoch": 1, "primary": "../x", "backups": [], "previous": {}}'):
            client.set(keys.TOPOLOGY, value)
            client.set(keys.INTENT, value)
            wait_until(lambda: any(b.trouble for b in decisions.view(client).beats))
            shown = both.run("topology")
            assert "makes no sense" in shown.stdout
            assert "Traceback" not in shown.stderr
            send(both, "still old")
            client.delete(keys.TOPOLOGY, keys.INTENT)
            wait_until(lambda: not any(b.trouble for b in decisions.view(client).beats))
        client.rpush(keys.TOPOLOGY, "x")
        client.rpush(keys.INTENT, "x")
        send(both, "still old")
        assert both.run("promote", "new", *FORCED).returncode == 1, "somebody seems to prepare something"
        client.delete(keys.INTENT)
        done = both.run("promote", "new", *FORCED)
        assert done.returncode == 0, done.stdout + done.stderr
    assert set(subjects(old)) == {"still old"}
    assert "Traceback" not in both.log


# Two at once, and those that die ----------------------------------------------------------------------------------


def test_of_two_operators_one_is_told_of_the_other(product: Make, scripted: Callable[..., ScriptedServer]) -> None:
    """While one prepares, the other is told so; of two that decide at once, the second changes nothing."""
    old, new = scripted(), scripted()
    both = pair(product, old, new)
    with redis.Redis.from_url(both.redis_url) as client:
        plans = [promotion.plan(client, settings_of(both), "new") for _ in range(2)]
        intent = promotion.prepare(client, plans[0], 30, nothing)
        told = both.run("promote", "new", *FORCED)
        assert told.returncode == 1
        assert "has been preparing new for" in told.stderr
        assert "preparing" in both.run("topology").stdout
        assert both.run("promote", "--cancel").returncode == 0
        assert both.run("promote", "--cancel").returncode == 1
        with pytest.raises(decisions.Overtaken, match="cancelled"):
            promotion.commit(client, plans[0], "", {}, intent)
        promotion.commit(client, plans[0], "", {}, None)
        with pytest.raises(decisions.Overtaken, match=r"promoted new \d+ s before you"):
            promotion.commit(client, plans[1], "", {}, None)
        assert decisions_of(both).epoch == 1
        assert len(both.json("audit")) == 1
        assert followers.follow(client, plans[0], 30, nothing).is_whole


def test_an_intent_ends_by_itself(redis_client: redis.Redis) -> None:
    """Whoever prepared was killed: when the time is over the next one may."""
    decisions.propose(redis_client, 1, "new", "old", 0.3)
    with pytest.raises(decisions.Overtaken):
        decisions.propose(redis_client, 1, "new", "old", 0.3)
    wait_until(lambda: not redis_client.exists(keys.INTENT))
    decisions.propose(redis_client, 1, "new", "old", 60)


def test_a_decision_is_followed_without_who_made_it(product: Make, scripted: Callable[..., ScriptedServer]) -> None:
    """The command is killed right after its commit: everybody follows, also who was started again in between."""
    old, new = scripted(), scripted()
    both = pair(product, old, new, settings={"smtp.processes": "2"})
    with redis.Redis.from_url(both.redis_url) as client:
        plan = promotion.plan(client, settings_of(both), "new")
        intent = promotion.prepare(client, plan, 30, nothing)
        both.child("relay-1").kill()
        promotion.commit(client, plan, "", {}, intent)  # and nothing more
        wait_until(
            lambda: (
                len(decisions.view(client).living) == 2
                and all(map(decisions.view(client).follows, decisions.view(client).living))
            )
        )
    assert remembered.load(both.state_dir).epoch == 1
    for n in range(4):
        send(both, f"{n}")
    assert set(subjects(new)) == {"0", "1", "2", "3"}


def test_prepare_waits_for_a_process_that_is_started_again(
    product: Make, scripted: Callable[..., ScriptedServer]
) -> None:
    """One that hangs keeps everything as it is, and is named; killed, its successor prepares in its place."""
    old, new = scripted(), scripted()
    both = pair(product, old, new, settings={"smtp.processes": "2"})
    with redis.Redis.from_url(both.redis_url) as client:
        plan = promotion.plan(client, settings_of(both), "new")
        hanging = both.child("relay-2")
        hanging.signal(signal.SIGSTOP)
        with pytest.raises(Unprepared) as caught:
            promotion.prepare(client, plan, 2, nothing)
        assert "/2: no answer" in caught.value.lines[0]
        assert not client.exists(keys.INTENT)

        def kill(_: str) -> None:
            if hanging.pid in {child.pid for child in both.children()}:
                hanging.kill()

        promotion.prepare(client, plan, 30, kill)


# Redis goes away, and comes back as another -----------------------------------------------------------------------


def test_redis_goes_away_between_the_decision_and_who_follows_it(
    product: Make, scripted: Callable[..., ScriptedServer], redis_factory: Callable[..., RedisServer]
) -> None:
    """Mail goes to the old server meanwhile, its copy is spooled for the new one; then everybody follows."""
    server = redis_factory()
    old, new = scripted(), scripted()
    both = pair(product, old, new, redis_url=server.url)
    relay = both.child("relay-1")
    with server.client() as client:
        plan = promotion.plan(client, settings_of(both), "new")
        relay.signal(signal.SIGSTOP)
        promotion.commit(client, plan, "", {}, None)
    server.kill()
    relay.signal(signal.SIGCONT)
    send(both, "meanwhile")
    assert subjects(old) == ["meanwhile"]
    server.start()
    with server.client() as client:
        wait_until(lambda: any(beat.epoch == 1 for beat in decisions.view(client).living))
    new.wait_for(1)
    send(both, "then")
    assert subjects(new)[-1] == "then"
    old.wait_for(2)


def test_a_start_while_redis_is_away(
    product: Make, scripted: Callable[..., ScriptedServer], redis_factory: Callable[..., RedisServer]
) -> None:
    """The state folder remembers who was promoted: a restart does not go back to what the settings say."""
    server = redis_factory()
    old, new = scripted(), scripted()
    relay = pair(product, old, new, redis_url=server.url, command="relay")
    with server.client() as client:
        promoted(client, relay, "new")
    assert relay.stop() == 0
    server.stop()
    relay.waits["relay.daemon.ledger_redis._SPOOL_PATIENCE"] = 0.3
    relay.start(wait=False)
    wait_until(lambda: _sends(relay, "away"))
    assert subjects(new) == ["away"]
    assert "settings and topology disagree" in relay.log
    server.start()
    wait_until(lambda: (server.client().zcard(keys.PENDING + "old")) == 1)


def _sends(relay: Product, subject: str) -> bool:
    try:
        send(relay, subject)
    except (OSError, AssertionError):
        return False
    return True


def test_a_redis_that_was_given_older_data_back(
    product: Make, scripted: Callable[..., ScriptedServer], redis_client: redis.Redis, redis_url: str
) -> None:
    """Nobody goes back to a lower epoch: /readyz and `topology` say so, and the next promotion holds over both."""
    old, new = scripted(), scripted()
    relay = pair(product, old, new, redis_url=redis_url, command="relay")
    promoted(redis_client, relay, "new")
    older = redis_client.get(keys.TOPOLOGY)
    promoted(redis_client, relay, "old")
    for data in (older, None):
        if data:
            redis_client.set(keys.TOPOLOGY, data)
        else:
            redis_client.delete(keys.TOPOLOGY)
        wait_until(lambda: "keeps epoch 2" in relay.get("/readyz")[1])
        send(relay, "kept")
    assert subjects(old) == ["kept", "kept"]
    assert relay.run("topology").returncode == 1
    os.kill(relay.child("relay-1").pid, signal.SIGKILL)
    wait_until(lambda: _sends(relay, "kept"))
    assert set(subjects(old)) == {"kept"}
    done = relay.run("promote", "new", *FORCED)
    assert done.returncode == 0, done.stdout + done.stderr
    assert decisions_of(relay).epoch == 3
    redis_client.delete(keys.TOPOLOGY)
    back = relay.run("undo", "--yes")
    assert back.returncode == 0, back.stdout + back.stderr
    assert (decisions_of(relay).primary, decisions_of(relay).epoch) == ("old", 4)


def test_settings_that_are_edited_to_agree(product: Make, scripted: Callable[..., ScriptedServer]) -> None:
    """After a promotion the settings are turned round and all is started again: nothing changes, and nothing warns."""
    old, new = scripted(), scripted()
    both = pair(product, old, new)
    with redis.Redis.from_url(both.redis_url) as client:
        promoted(client, both, "new")
    assert both.stop() == 0
    both.settings |= {
        "relay.destination_primary": f"new={new.address}",
        "relay.destination_backups": f"old={old.address}",
    }
    both.start()
    send(both, "agreed")
    assert subjects(new) == ["agreed"]
    old.wait_for(1)
    assert both.json("topology")[0]["settings_agree"] is True
    assert "settings and topology agree" in both.log
    with redis.Redis.from_url(both.redis_url) as client, pytest.raises(Impossible):
        promotion.plan(client, settings_of(both), "gone")


def test_whoever_is_demoted_has_workers_at_once(product: Make, scripted: Callable[..., ScriptedServer]) -> None:
    """Not only when copies are found; what waits for the new primary is still delivered by its own workers."""
    old, new = scripted(), scripted({"RCPT": "451 4.7.1 later"})
    both = pair(product, old, new)
    send(both, "owed")
    wait_until(lambda: both.summary("new")["retrying"] == 1)
    new.replies.clear()
    with redis.Redis.from_url(both.redis_url) as client:
        promoted(client, both, "new")
    both.wait_for_log("worker-old-1 started")
    assert not old.messages or subjects(old) == ["owed"]
    new.wait_for(1)
    assert subjects(new) == ["owed"]
    refused = both.run("queue", "forget", "old")
    assert refused.returncode == 1
    assert "backup since new was promoted" in refused.stderr


def test_what_was_uncertain_at_the_old_primary(product: Make, scripted: Callable[..., ScriptedServer]) -> None:
    """Its second try, which the new one takes, stands for it there; the old one may have it twice, and that is told."""
    old, new = scripted({".": Reset()}), scripted()
    both = pair(product, old, new, settings={"relay.uncertain_hold": "5m"})
    mail = b"Subject: once\r\nMessage-ID: <1@example.com>\r\n\r\nx\r\n"
    with both.dialogue() as client, redis.Redis.from_url(both.redis_url) as connection:
        client.hello()
        client.mail("a@example.com", "b@example.com", data=mail, end=451)
        wait_until(lambda: connection.hlen(keys.TWINS))
        (twin,) = (i.decode() for i in connection.zrange(keys.UNCERTAIN, 0, -1))
        old.replies.clear()
        promoted(connection, both, "new")
        client.mail("a@example.com", "b@example.com", data=mail)
        old.wait_for(1)
        both.wait_for_log("may repeat")
        connection.zadd(keys.UNCERTAIN, {twin: 1}, xx=True)  # its hold is over
        wait_until(lambda: is_drained(both))
    assert subjects(new) == ["once"]
    (event,) = (e for e in both.events if e["event"] == "may repeat")
    assert event["destination"] == "old"
    assert twin in event["reason"]
    assert event["id"] != twin


def test_settings_that_are_turned_round_and_reloaded(product: Make, scripted: Callable[..., ScriptedServer]) -> None:
    """After a promotion, under load: the settings agree without a restart, and the next promotion goes back."""
    old, new = scripted(), scripted()
    text = '[relay]\ndestination_primary = "{}={}"\n[[backup]]\nname = "{}"\nurl = "{}"\n'
    first = text.format("old", old.address, "new", new.address)
    both = product(settings=SETTINGS, files={"settings.toml": first})
    sender = Sender(both.smtp_port, range(100_000)).start()
    assert both.run("promote", "new", *FORCED).returncode == 0
    (both.directory / "settings.toml").write_text(text.format("new", new.address, "old", old.address))
    assert both.run("reload").returncode == 0
    assert both.json("topology")[0]["settings_agree"] is True
    before = len(sender.accepted)
    wait_until(lambda: len(sender.accepted) > before + 20)
    assert both.run("promote", "old", *FORCED).returncode == 0
    before = len(sender.accepted)
    wait_until(lambda: len(sender.accepted) > before + 20)
    sender.stop()
    accepted = sender.join()
    for server in (old, new):
        wait_until(lambda server=server: accepted <= set(map(int, subjects(server))))
    assert not [e for e in both.events if e["level"] == "error"]
