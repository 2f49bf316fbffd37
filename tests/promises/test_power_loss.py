"""The power fails: what was not yet on stable storage is gone, and with it nothing that a client was promised.

A SIGKILL proves nothing about fsync, since the kernel keeps what was written. Here the file system itself is shut down
without flushing its journal (FS_IOC_SHUTDOWN), under traffic, and mounted again as after a power cut.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple

import pytest
import redis

from relay.config import loader
from relay.ledger import keys, overview
from relay.spool import writer
from support.child_processes import tied
from support.product import QUICK, SOON, Product
from support.retrying_sender import Sender
from support.scripted_server import ScriptedServer
from support.waiting import wait_until
from workers.upkeep.reconciler import verify

WAITS = SOON

FS_IOC_SHUTDOWN = 0x8004587D
NO_LOG_FLUSH = 2  # EXT4_GOING_FLAGS_NOLOGFLUSH: what the journal has not committed is lost
SETTINGS = {
    **QUICK,
    "relay.timeout_seconds": "5",
    "relay.uncertain_hold": "1",
    "relay.require_durable_copies": "true",
    "redis.timeout_seconds": "1",
}


class Cut(NamedTuple):
    """When the power began to fail, and when it was gone.

    In between no answer says anything: with its journal aborted under it, an fsync that was under way may return
    success for what is lost. After a real power cut nobody lives to hear that.
    """

    begun: float
    done: float

    def parts(self, span: tuple[float, float]) -> bool:
        """Say whether a message was on its way meanwhile: begun before the power was gone, answered after it began."""
        begun, answered = span
        return begun <= self.done and answered >= self.begun


class Disk:
    """An ext4 file system in a file, to be mounted and to lose its power."""

    def __init__(self, directory: Path) -> None:
        self.image = directory / "image"
        self.mounted = directory / "disk"
        self.mounted.mkdir()
        with self.image.open("wb") as image:
            image.truncate(256 << 20)
        _run("mkfs.ext4", "-q", "-F", str(self.image))

    def mount(self) -> None:
        # Nothing is committed just because some seconds have passed: only an fsync saves.
        _run("mount", "-o", "loop,commit=300", str(self.image), str(self.mounted))

    def lose_power(self) -> Cut:
        descriptor = os.open(self.mounted, os.O_RDONLY)
        try:
            begun = time.monotonic()
            fcntl.ioctl(descriptor, FS_IOC_SHUTDOWN, struct.pack("I", NO_LOG_FLUSH))
            return Cut(begun, time.monotonic())
        finally:
            os.close(descriptor)

    def unmount(self) -> None:
        """Unmount it, and go on with a copy of what is on it.

        Another program's mount namespace, made meanwhile, still has the old one mounted, without power: the same image
        would be the same dead file system again.
        """
        wait_until(lambda: self._try("umount"), message="the disk cannot be unmounted")
        copy = self.image.with_name("copy")
        subprocess.run(["cp", "--sparse=always", str(self.image), str(copy)], check=True)
        copy.replace(self.image)

    def remove(self) -> None:
        if self.mounted.is_mount() and not self._try("umount"):
            self._try("umount", "-l")

    def _try(self, *words: str) -> bool:
        return subprocess.run([*words, str(self.mounted)], capture_output=True, check=False).returncode == 0


def _run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no ext4 on a loop device here: {' '.join(words)}: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("a file system that can lose its power needs root on Linux")
    if not shutil.which("mkfs.ext4"):
        pytest.skip("needs mkfs.ext4")
    made = Disk(tmp_path)
    try:
        made.mount()
        yield made
    finally:
        made.remove()


@pytest.mark.parametrize("elsewhere", [False, True])
def test_the_disk_forgets(disk: Disk, elsewhere: bool) -> None:
    """The power cut of these tests is one: it keeps what was fsync'd, and nothing else; whoever else has it mounted."""
    with ExitStack() as ends:
        if elsewhere:
            # As the tests with network hosts and with Exim do, beside this one.
            command = ["unshare", "-m", "--propagation", "private", "sh", "-c", "echo; exec sleep 120"]
            other = ends.enter_context(subprocess.Popen(tied(command), stdout=subprocess.PIPE))
            ends.callback(other.kill)
            assert other.stdout is not None
            assert other.stdout.readline()
        _forgets(disk)


def _forgets(disk: Disk) -> None:
    for name in ("kept", "lost"):
        with (disk.mounted / name).open("wb") as file:
            file.write(b"x" * 10000)
            file.flush()
            if name == "kept":
                os.fsync(file.fileno())
    disk.lose_power()
    disk.unmount()
    disk.mount()
    assert (disk.mounted / "kept").read_bytes() == b"x" * 10000
    lost = disk.mounted / "lost"
    assert not lost.exists() or lost.stat().st_size == 0


@pytest.mark.timeout(240)
@pytest.mark.parametrize("where", ["ledger", "ledger, its log being rewritten", "spool"])
def test_power_loss(
    product: Callable[..., Product],
    primary: ScriptedServer,
    backup: ScriptedServer,
    disk: Disk,
    where: str,
) -> None:
    """Every copy that a client was promised is there after the power is back, in the ledger as in the spool."""
    backup.down()
    pair = product(primary=primary.address, backups=[backup.address], settings=SETTINGS, start=False)
    pair.state_dir = disk.mounted / "state"
    pair.settings["state_dir"] = str(pair.state_dir)
    pair.start()
    server = pair.child("redis")
    sender = Sender(pair.smtp_port, range(100_000), sessions=6, patience=40).start()
    wait_until(lambda: len(sender.accepted) > 100)
    if where == "spool":
        server.signal(19)  # SIGSTOP: it hangs until the power fails
        wait_until(lambda: writer.summary(pair.state_dir / "spool").messages > 200)
    elif "rewritten" in where:
        with redis.Redis.from_url(pair.redis_url) as client:
            for _ in range(3):
                before, accepted = client.info("persistence")["aof_current_size"], len(sender.accepted)
                client.bgrewriteaof()
                wait_until(lambda: not _is_rewriting(client), message=f"the log of {before} octets is not rewritten")
                wait_until(lambda accepted=accepted: len(sender.accepted) > accepted + 20)
            client.bgrewriteaof()
    else:
        wait_until(lambda: len(sender.accepted) > 400)
    cut = disk.lose_power()
    # The clients have gone on into a dead disk; nothing may be accepted any more without a durable copy.
    refused = wait_until(lambda: sum(sender.attempts.values()) > len(sender.attempts) + 10)
    assert refused
    pair.kill()
    sender.stop()
    accepted = {number for number in sender.join() if not cut.parts(sender.spans[number])}
    disk.unmount()
    disk.mount()

    backup.listen()
    pair.start()
    at_backup = lambda: {int(m.header("Subject") or -1) for m in backup.messages}  # noqa: E731 - short
    wait_until(lambda: _is_drained(pair), 150, lambda: f"not drained: {pair.log[-4000:]}")
    missing = sorted(accepted - at_backup())
    assert not missing, f"{len(missing)} of {len(accepted)} missing, the first {missing[:20]}"


def _is_rewriting(client: redis.Redis) -> bool:
    state = client.info("persistence")
    return bool(state["aof_rewrite_in_progress"] or state["aof_rewrite_scheduled"])


def _is_drained(pair: Product) -> bool:
    """Say whether nothing is under way; sweeps first, as the reconciler does once a minute."""
    with suppress(redis.RedisError), redis.Redis.from_url(pair.redis_url) as client:
        verify(client, loader.load(environ=pair.environment, directories=()), pause=0.5)
        # In the order in which a message goes through them, so that none is passed by on its way.
        left = writer.summary(pair.state_dir / "spool").messages
        left += client.zcard(keys.STAGED) + client.zcard(keys.UNCERTAIN)
        return not left and all(row.pending == 0 for row in overview.summary(client))
    return False
