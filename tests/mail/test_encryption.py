"""Encryption at rest: nothing readable is stored, nothing else opens it, and no key trouble loses a message."""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from relay.ledger import archive
from relay.ledger import keys as ledger_keys
from relay.mail import encryption
from relay.mail.envelope import Envelope, MalformedRecord
from relay.mail.ids import IdSource
from relay.mail.recipient import Recipient
from relay.mail.record import BodyElsewhere, LockedRecord, Message
from relay.spool import writer
from relay.spool.files import SpoolFiles
from support import listed_copies
from support.ledger_contents import Contents, settings
from support.product import Product
from support.scripted_server import ScriptedServer
from support.waiting import wait_until
from workers.queues import failed
from workers.upkeep.sweep import Sweeper

Make = Callable[..., Product]

# Short, so that it is stored uncompressed and could be seen.
CANARY = "xyzzy-the-canary-sings"
BODY = f"Message-ID: <1@test>\r\nSubject: {CANARY}\r\n\r\n..{CANARY}\r\n".encode()
_ids = IdSource()


@pytest.fixture(autouse=True)
def _own_keys() -> Iterator[None]:
    """Each test has the keys that it says, whatever the others run with."""
    before = encryption.ring()
    encryption.use(None)
    yield
    encryption.use(before.path if before else None)


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """A key file, in use."""
    path = tmp_path / "keys"
    encryption.add_key(path)
    encryption.use(path)
    return path


def message(body: bytes = BODY) -> Message:
    recipients = (Recipient(f"{CANARY}@test", ("NOTIFY=NEVER",)),)
    return Message(
        Envelope(_ids.next(), f"from-{CANARY}@test", recipients, 1.0, len(body), destinations=("new",)), body
    )


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


# Records ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [b"", b"x\r\n", BODY, BODY * 1000, os.urandom(1 << 20).replace(b".", b"") + b"\r\n"],
    ids=["empty", "small", "text", "large", "random"],
)
def test_what_is_sealed_opens_again(keys: Path, body: bytes) -> None:
    """A sealed record gives back the message, shows nothing of it, and is hardly longer than a plain one."""
    sent = message(body)
    record = sent.pack()
    assert Message.unpack(record, sent.envelope.id) == sent
    assert Message.unpack_envelope(record, sent.envelope.id) == sent.envelope
    assert CANARY.encode() not in record
    encryption.use(None)
    plain = sent.pack()
    assert CANARY.encode() in plain
    assert len(record) - len(plain) < 60


def test_no_two_records_are_alike(keys: Path) -> None:
    """The same message sealed twice has nothing in common but the key's id: no key and nonce serve twice."""
    sent = message()
    one, two = (sent.pack()[10:] for _ in range(2))
    assert sum(a == b for a, b in zip(one, two, strict=True)) < len(one) / 16


def test_a_record_opens_under_its_own_id_only(keys: Path) -> None:
    """Records cannot change places, nor one's body go with another's envelope."""
    one, two = message(), message()
    first, second = one.pack(), two.pack()
    start = 6 + int.from_bytes(first[2:6])
    for record in (second, first[:start] + second[start:], second[:start] + first[start:]):
        with pytest.raises(MalformedRecord, match="it is not what was sealed as"):
            Message.unpack(record, one.envelope.id)
    with pytest.raises(MalformedRecord):
        Message.unpack_envelope(second, one.envelope.id)


def test_not_an_octet_can_be_changed(keys: Path) -> None:
    """Whatever is changed in a record or cut off from it, it does not open, and says so in the one way."""
    sent = message()
    record = sent.pack()
    for at in range(len(record)):
        spoilt = bytearray(record)
        spoilt[at] ^= 1
        with pytest.raises((MalformedRecord, BodyElsewhere)):
            Message.unpack(bytes(spoilt), sent.envelope.id)
        with pytest.raises(MalformedRecord):
            Message.unpack(record[:at], sent.envelope.id)


def test_rotation(keys: Path) -> None:
    """The first key seals, all of them open; one that comes back to the file is found there without a restart."""
    old = message()
    record = old.pack()
    (old_key,) = lines(keys)
    encryption.add_key(keys)
    encryption.reload()
    assert Message.unpack(record, old.envelope.id) == old
    new = message()
    assert new.pack()[6:10].hex() == lines(keys)[0].partition(":")[0] != record[6:10].hex()
    keys.write_text(lines(keys)[0] + "\n")
    encryption.reload()
    with pytest.raises(LockedRecord, match=f"{old_key.partition(':')[0]}.*not in {keys}"):
        Message.unpack(record, old.envelope.id)
    keys.write_text("\n".join([*lines(keys), "# the old one", "", old_key]))
    assert Message.unpack(record, old.envelope.id) == old


def test_switched_on_and_off(keys: Path) -> None:
    """Plain records are read with a key file, sealed ones are said to need it without."""
    sealed = message()
    record = sealed.pack()
    encryption.use(None)
    plain = message()
    with pytest.raises(LockedRecord, match="key_file is not set"):
        Message.unpack(record, sealed.envelope.id)
    encryption.use(keys)
    assert Message.unpack(plain.pack(), plain.envelope.id) == plain


def test_it_costs_nothing_when_it_is_off() -> None:
    """Without a key file no process of the product even loads the ciphers."""
    code = """if True:
        import sys, relay.server.relay_process, relay.monitoring.probes, workers.delivery.courier, workers.upkeep.sweep
        sys.exit(any(name.startswith("cryptography.hazmat") for name in sys.modules))
    """
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(__file__).parents[2]).returncode == 0


# The file -----------------------------------------------------------------------------------------------------


def test_a_new_file_is_private(tmp_path: Path) -> None:
    """A key file is its owner's alone, whatever the umask; another key leaves those in it, behind the new one."""
    path = tmp_path / "keys"
    before = os.umask(0)
    try:
        (first,) = encryption.add_key(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o400)
    assert encryption.add_key(path)[1:] == [first]
    assert stat.S_IMODE(path.stat().st_mode) == 0o400
    assert [p.name for p in tmp_path.iterdir()] == ["keys"]


BAD_FILES = {
    "missing": (None, "cannot be read: No such file"),
    "empty": ("\n# nothing\n", "has no key"),
    "a word": ("secret\n", ":1: expected another key"),
    "too short": ("12345678:c2hvcnQ=\n", ":1: expected another key"),
    "damaged": ("{flipped}\n", ":1: expected another key"),
    "plain in the middle": ("{key}\nplain\n", ":2: expected another key"),
    "plain alone": ("plain\n", "has no key"),
    "twice": ("{key}\n{key}\n", ":2: expected another key"),
}


@pytest.mark.parametrize("fault", BAD_FILES)
def test_a_bad_file_is_one_line(tmp_path: Path, fault: str) -> None:
    """A file that is no use is told in one line that has none of its content."""
    path, key = tmp_path / "keys", encryption.new_key()
    text, told = BAD_FILES[fault]
    if text is not None:
        text = text.format(key=key, flipped=key[:-10] + ("A" if key[-10] != "A" else "B") + key[-9:])
        path.write_text(text)
        path.chmod(0o600)
    with pytest.raises(encryption.BadKeyFile) as caught:
        encryption.use(path)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not any(word in str(caught.value) for word in (text or "").replace("#", "").split())
    if fault != "missing":
        with pytest.raises(encryption.BadKeyFile):
            encryption.add_key(path)
        assert path.read_text() == text


@pytest.mark.parametrize("mode", [0o640, 0o660, 0o604, 0o606, 0o601])
def test_a_file_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    """A key that anybody else can read or write is no key. Root's may be given to the service's group."""
    path = tmp_path / "keys"
    encryption.add_key(path)
    path.chmod(mode)
    if os.geteuid() == 0:
        if mode == 0o640:
            encryption.use(path)
        os.chown(path, 65534, -1)
    with pytest.raises(encryption.BadKeyFile, match=f"mode {mode:04o}"):
        encryption.use(path)


def test_a_file_spoilt_later_changes_nothing(keys: Path) -> None:
    """What cannot be read at a reload leaves the keys as they are."""
    sent = message()
    record = sent.pack()
    keys.write_text("oops")
    with pytest.raises(encryption.BadKeyFile):
        encryption.reload()
    assert Message.unpack(record, sent.envelope.id) == sent
    assert Message.unpack(message().pack()[:6] + record[6:], sent.envelope.id) == sent


# Where records lie --------------------------------------------------------------------------------------------


def test_bodies_move_and_come_back_sealed(redis_client: redis.Redis, tmp_path: Path, keys: Path) -> None:
    """failed.max_bytes moves what is sealed as it is, without the key too; the key is asked for to show and export."""
    contents = Contents(redis_client, "new")
    message_id = contents.pending(body=os.urandom(500).hex().encode() + b"\r\n")
    contents.fail(message_id)
    mail = failed.export(redis_client, message_id)
    shown = failed.show(redis_client, message_id)
    record = redis_client.get(ledger_keys.MESSAGE + message_id)
    folder = archive.folder(tmp_path)
    encryption.use(None)
    Sweeper(redis_client, settings(state_dir=str(tmp_path), failed_max_bytes="0")).sweep()
    assert (folder / message_id).read_bytes() == record
    with pytest.raises(LockedRecord):
        failed.export(redis_client, message_id, folder)
    assert failed.show(redis_client, message_id)[0].reply == shown[0].reply
    encryption.use(keys)
    assert failed.export(redis_client, message_id, folder) == mail
    assert failed.show(redis_client, message_id) == shown
    encryption.use(None)
    assert listed_copies.retry(redis_client, [message_id], folder=folder) == 1
    assert redis_client.get(ledger_keys.MESSAGE + message_id) == record


def test_a_locked_file_stays_in_the_spool(tmp_path: Path, keys: Path) -> None:
    """A spooled message whose key is not here waits in its place: it is not set aside with what cannot be read."""
    folder = tmp_path / "spool"
    shelf = SpoolFiles(folder)
    os.close(shelf.take_over())
    sent = message()
    record = sent.pack()
    path = writer.messages(folder) / f"{sent.envelope.id}-{len(record)}.ready"
    path.write_bytes(record)
    encryption.use(None)
    (entry,) = shelf.survey().mail
    assert shelf.load([entry]) == []
    assert path.exists()
    encryption.use(keys)
    (loaded,) = shelf.load([entry])
    assert loaded.record == record
    assert loaded.released.destinations == ("new",)
    assert loaded.released.digest


def test_uncertain_messages_find_their_twins(redis_client: redis.Redis, keys: Path) -> None:
    """What was left staged is held under its digest, and copied when its hold is over, all of it sealed."""
    contents = Contents(redis_client, "new")
    message_id = contents.staged(deadline=-120)
    sweeper = Sweeper(redis_client, settings(relay_uncertain_hold="1h"))
    sweeper.sweep()
    assert redis_client.hvals(ledger_keys.TWINS) == [message_id.encode()]
    redis_client.zadd(ledger_keys.UNCERTAIN, {message_id: 1})
    encryption.use(None)
    sweeper.sweep()
    assert contents.pending_ids() == []
    assert redis_client.zscore(ledger_keys.UNCERTAIN, message_id) > 1
    redis_client.zadd(ledger_keys.UNCERTAIN, {message_id: 1})
    encryption.use(keys)
    sweeper.sweep()
    assert contents.pending_ids() == [message_id]


# The whole product --------------------------------------------------------------------------------------------

QUICK = {
    "retry.first": "1",
    "retry.longest": "1",
    "redis.timeout_seconds": "1",
    "relay.timeout_seconds": "5",
    "relay.greeting_timeout_seconds": "1",
    "relay.command_timeout_seconds": "1",
}


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "product-keys"
    encryption.add_key(path)
    return path


def places_with(text: str, root: Path) -> set[str]:
    """Return which files below a folder hold a text: ``aof``, ``rdb``, ``spool``, ``failed``, ``trace`` or the name."""
    found = set()
    for path in root.rglob("*"):
        if path.is_file() and text.encode() in path.read_bytes():
            kind = path.suffix.strip(".") if path.suffix in {".aof", ".rdb"} else ""
            found.add(kind or next((p for p in ("spool", "failed", "trace") if p in path.parts), path.name))
    return found


def jobs_with(text: str, client: redis.Redis) -> list[bytes]:
    """Return the keys of RQ that hold a text."""
    read = {
        b"hash": client.hgetall,
        b"zset": lambda key: client.zrange(key, 0, -1),
        b"set": client.smembers,
        b"list": lambda key: client.lrange(key, 0, -1),
        b"string": client.get,
    }
    return [key for key in client.scan_iter("rq:*") if text.encode() in repr(read[client.type(key)](key)).encode()]


@pytest.mark.long
@pytest.mark.parametrize("sealed", [True, False])
def test_a_canary_is_nowhere_to_be_found(
    product: Make, primary: ScriptedServer, backup: ScriptedServer, key_file: Path, sealed: bool
) -> None:
    """With a key file no file of Redis, spool or failed list, no job, log or metric has a word of the mail, nor
    its addresses; without one each place where mail is stored has, which shows that this looks in the right places.
    """
    one = product(
        primary=primary.address,
        backups=[backup.address],
        settings={**QUICK, "storage.key_file": str(key_file) if sealed else "", "failed.max_bytes": "0"},
    )
    stored = set[str]()
    with redis.Redis.from_url(one.redis_url) as client:
        client.config_set("rdbcompression", "no")  # or the text might be there unseen
        backup.replies["."] = ["550 5.7.1 no", "451 4.7.1 later"]
        one.send("a@example.com", "b@example.com", data=BODY)
        wait_until(lambda: one.json("failed", "list"))
        one.send("a@example.com", f"{CANARY}@example.com", data=BODY)
        wait_until(lambda: one.json("queue", "list"))
        client.config_set("aof-use-rdb-preamble", "no")
        client.save()
        stored |= places_with(CANARY, one.state_dir)
        one.run("queue", "verify")
        stored |= places_with(CANARY, one.state_dir)
        assert not jobs_with(CANARY, client)
        (failure,) = one.json("failed", "list")
        assert CANARY in one.run("failed", "export", failure["id"]).stdout
        backup.down()
        keeper = one.child("redis")
        keeper.signal(signal.SIGSTOP)
        try:
            one.send("a@example.com", f"{CANARY}@example.com", data=BODY)
            stored |= places_with(CANARY, one.state_dir)
            metrics = one.get("/metrics")[1]
        finally:
            keeper.signal(signal.SIGCONT)
        wait_until(lambda: one.summary()["pending"] == 2)
        wait_until(lambda: not writer.summary(one.state_dir / "spool").messages)
        client.bgrewriteaof()
        wait_until(lambda: not client.info("persistence")["aof_rewrite_in_progress"])
        stored |= places_with(CANARY, one.state_dir)
    assert stored == (set() if sealed else {"aof", "rdb", "spool", "failed", "trace"})
    assert CANARY not in one.log.replace(f"{CANARY}@example.com", "")
    assert CANARY not in metrics
    backup.replies.clear()
    backup.listen()
    one.run("queue", "flush")
    assert all(copy.body.endswith(BODY) for copy in backup.wait_for(2, timeout=60))


def test_no_key_no_loss(product: Make, primary: ScriptedServer, backup: ScriptedServer, key_file: Path) -> None:
    """Workers without the key keep every copy waiting, with a reason that says what to do, and die of nothing; when
    the key is put into their file they deliver, without a restart.
    """
    other = key_file.with_name("other-keys")
    encryption.add_key(other)
    options = {**QUICK, "storage.key_file": str(key_file), "retry.longest": "2"}
    relay = product(primary=primary.address, backups=[backup.address], settings=options)
    backup.down()
    relay.send("a@example.com", "b@example.com", data=BODY)
    wait_until(lambda: relay.summary()["pending"] == 1)
    relay.stop()
    backup.listen()
    relay.settings["storage.key_file"] = str(other)
    relay.start()
    key_id = lines(key_file)[0].partition(":")[0]
    wait_until(lambda: any(key_id in (row["last_reply"] or "") for row in relay.json("queue", "list")), 60)
    (row,) = relay.json("queue", "list")
    assert row["last_reply"].endswith(f"sealed with key {key_id}, which is not in {other}: put it back there")
    relay.send("a@example.com", "c@example.com", data=b"Subject: new\r\n\r\n")
    assert backup.wait_for(1)[0].recipients == ["c@example.com"]
    with other.open("a") as file:
        file.write(key_file.read_text())
    copies = {copy.recipients[0]: copy for copy in backup.wait_for(2, timeout=60)}
    assert copies["b@example.com"].body.endswith(BODY)
    starts = [e["event"] for e in relay.events if re.match(r"worker-.* started as process", e["event"])]
    assert len(starts) == 2, starts  # one for each start of the product


def test_a_forged_record_is_kept_for_a_person(
    product: Make, primary: ScriptedServer, backup: ScriptedServer, key_file: Path
) -> None:
    """A record that somebody has put under another id is delivered to nobody: it goes to the failed list, whole."""
    one = product(
        primary=primary.address, backups=[backup.address], settings={**QUICK, "storage.key_file": str(key_file)}
    )
    backup.down()
    for name in ("b", "c"):
        one.send("a@example.com", f"{name}@example.com", data=BODY)
    wait_until(lambda: len(one.json("queue", "list")) == 2)
    to = {row["recipients"][0]: row["id"] for row in one.json("queue", "list")}
    with redis.Redis.from_url(one.redis_url) as client:
        forged = client.get(ledger_keys.MESSAGE + to["c@example.com"])
        client.set(ledger_keys.MESSAGE + to["b@example.com"], forged)
        backup.listen()
        one.run("queue", "flush")
        assert backup.wait_for(1)[0].recipients == ["c@example.com"]
        (row,) = wait_until(lambda: one.json("failed", "list"))
        assert row["id"] == to["b@example.com"]
        assert "it is not what was sealed as" in row["reply"]
        assert client.get(ledger_keys.MESSAGE + to["b@example.com"]) == forged
    assert len(backup.messages) == 1


def test_on_rotated_and_off(product: Make, primary: ScriptedServer, backup: ScriptedServer, key_file: Path) -> None:
    """Messages from before the key file, under each key of it, and from after it are all delivered."""
    everybody = {f"{name}@example.com" for name in ("plain", "first", "second", "last")}
    one = product(primary=primary.address, backups=[backup.address], settings={**QUICK, "storage.key_file": ""})
    backup.down()
    one.send("a@example.com", "plain@example.com", data=BODY)
    one.stop()
    one.settings["storage.key_file"] = str(key_file)
    one.start()
    one.send("a@example.com", "first@example.com", data=BODY)
    assert one.run("new-key", str(key_file)).returncode == 0
    one.process.send_signal(signal.SIGHUP)
    one.wait_for_log(f"sealed with key {lines(key_file)[0].partition(':')[0]}")
    one.send("a@example.com", "second@example.com", data=BODY)
    key_file.write_text(f"plain\n{key_file.read_text()}")
    one.process.send_signal(signal.SIGHUP)
    one.wait_for_log("stored as it is")
    one.send("a@example.com", "last@example.com", data=BODY)
    with redis.Redis.from_url(one.redis_url) as client:
        records = [client.get(key) for key in client.scan_iter(ledger_keys.MESSAGE + "*")]
    assert sorted(record[0] for record in records) == [1, 1, 2, 2]
    assert len({record[6:10] for record in records if record[0] == 2}) == 2
    assert {row["recipients"][0] for row in one.json("queue", "list")} == everybody
    backup.listen()
    one.run("queue", "flush")
    copies = backup.wait_for(4, timeout=60)
    assert {copy.recipients[0] for copy in copies} == everybody
    assert all(copy.body.endswith(BODY) for copy in copies)


def test_a_bad_file_stops_the_start(product: Make, primary: ScriptedServer, key_file: Path) -> None:
    """Who asked for encryption does not get plain storage: nothing starts, one line says why, and check says it too."""
    one = product(primary=primary.address, settings={"storage.key_file": str(key_file)}, start=False)
    (found,) = [row for row in one.json("check") if row.get("subject") == "storage.key_file"]
    assert found["ok"]
    assert lines(key_file)[0].partition(":")[0] in found["text"]
    key_file.write_text("oops\n")
    for command in ("up", "queue"):
        done = one.run(command, *(["summary"] if command == "queue" else []))
        assert done.returncode == 1
        (line,) = done.stderr.strip().splitlines()
        assert line.startswith(f"smtp-dup: storage.key_file: {key_file}:1: expected another key")
    done = one.run("check", "--json")
    assert done.returncode == 1
    assert "TROUBLE" in one.run("check").stdout


def test_only_the_service_user_gets_in(
    product: Make, primary: ScriptedServer, backup: ScriptedServer, key_file: Path
) -> None:
    """Whatever the umask: who is not the service user can read none of the files where mail or passwords lie, and
    reach none of the sockets.
    """
    before = os.umask(0)
    try:
        one = product(primary=primary.address, backups=[backup.address], settings={**QUICK, "failed.max_bytes": "0"})
    finally:
        os.umask(before)
    backup.replies["."] = "550 5.7.1 no"
    one.send("a@example.com", "b@example.com", data=BODY)
    wait_until(lambda: one.json("failed", "list"))
    one.run("queue", "verify")
    keeper = one.child("redis")
    keeper.signal(signal.SIGSTOP)
    try:
        one.send("a@example.com", "b@example.com", data=BODY)
        reached = set(_reached(one.state_dir))
        kept = {path.suffix for path in one.state_dir.rglob("*") if path.is_file() or path.is_socket()}
    finally:
        keeper.signal(signal.SIGCONT)
    assert {".aof", ".ready"} <= kept  # and the socket, where the path is short enough for one
    assert {path for path in reached if not path.is_dir()} == set()


def _reached(folder: Path) -> Iterator[Path]:
    """Yield what others can open below a folder, or get at by way of folders that they can pass through."""
    for path in folder.iterdir():
        mode = path.lstat().st_mode
        if path.is_dir():
            if mode & 0o011:
                yield from _reached(path)
        elif mode & 0o066:
            yield path
