"""What lies in the folder of sockets and is no worker's: nobody but a worker of ours is handed mail."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

import pytest

from relay import unix_sockets
from relay.handover.frames import Hello, Limits, folder_of, ledger_of
from relay.handover.handover import Handover
from support.waiting import until

URL = "redis://localhost"
WORDS = Hello("new", "worker", ledger_of(URL)).packed() + Limits(10, 1 << 20).packed()


def _listening(folder: Path, name: str) -> socket.socket:
    return unix_sockets.listening(folder, name, 5)


async def _lines(handover: Handover, folder: Path) -> set[str]:
    """Return whom a relay has connected to, once it has found the worker that is there in the end."""
    following = asyncio.ensure_future(handover.follow())
    last = _listening(folder, "zz-last.sock")
    await until(lambda: "zz-last.sock" in handover._lines)
    found = set(handover._lines)
    following.cancel()
    handover.close()
    last.close()
    return found


async def test_what_is_no_socket_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link to a socket elsewhere, a file, a folder, another user's socket: left alone, each told of once."""
    told: list[str] = []
    monkeypatch.setattr("relay.maillog.notice", lambda _level, _text, path: told.append(Path(path).name))
    folder = folder_of(tmp_path)
    folder.mkdir(0o700)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    target = _listening(elsewhere, "target.sock")
    (folder / "link.sock").symlink_to(elsewhere / "target.sock")
    (folder / "file.sock").write_bytes(b"keep me")
    (folder / "folder.sock").mkdir()
    (folder / "dangling.sock").symlink_to(tmp_path / "nothing")
    (folder / "notes.txt").write_text("not a socket at all")
    strangers = []
    if os.geteuid() == 0:
        strangers.append(_listening(folder, "stranger.sock"))
        os.chown(folder / "stranger.sock", 12345, 12345)
    dead = _listening(folder, "dead.sock")
    dead.close()
    handover = Handover(tmp_path, URL)
    for _ in range(3):
        handover._look(folder)
    assert await _lines(handover, folder) == {"zz-last.sock"}
    assert sorted(told) == sorted(
        ["link.sock", "file.sock", "folder.sock", "dangling.sock"] + ["stranger.sock"] * len(strangers)
    )
    assert (folder / "file.sock").read_bytes() == b"keep me"
    assert not (folder / "dead.sock").exists()
    for sock in (target, *strangers):
        sock.close()


@pytest.mark.parametrize("mode", [0o770, 0o707])
async def test_a_folder_that_others_can_write_to(tmp_path: Path, mode: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody there is handed anything, until it is closed."""
    told: list[str] = []
    monkeypatch.setattr("relay.maillog.notice", lambda _level, text, path: told.append(text + path))
    folder = folder_of(tmp_path)
    folder.mkdir()
    folder.chmod(mode)
    anybody = _listening(folder, "anybody.sock")
    handover = Handover(tmp_path, URL)
    for _ in range(3):
        handover._look(folder)
    assert not handover._lines
    assert len(told) == 1
    assert str(folder) in told[0]
    folder.chmod(0o700)
    assert await _lines(handover, folder) == {"anybody.sock", "zz-last.sock"}
    anybody.close()


@pytest.mark.parametrize(
    "words",
    [
        b"\xff" * 4096,
        b"[]\n",
        b'["new", "a worker", "x"]\n',
        b'["../../new", "worker", "x"]\n',
        b'["new", "worker"]\n' + bytes(64),
        b'{"a": ' * 5000,
        b"x" * 1025,
    ],
)
async def test_what_a_worker_never_says(tmp_path: Path, words: bytes) -> None:
    """It is hung up on, and offered nothing."""
    folder = folder_of(tmp_path)
    folder.mkdir(0o700)
    listener = _listening(folder, "odd.sock")
    handover = Handover(tmp_path, URL)
    handover._look(folder)
    sock, _ = listener.accept()
    sock.sendall(words)
    line = handover._lines["odd.sock"]
    await until(lambda: not line.is_open)
    handover.keep("1" * 16, (b"record",), ("new",))
    assert handover.offer("1" * 16, ("new",)) is None
    sock.close()
    listener.close()


async def test_an_endless_worker(tmp_path: Path) -> None:
    """Limits without an end take no memory, and the last one counts."""
    folder = folder_of(tmp_path)
    folder.mkdir(0o700)
    listener = _listening(folder, "endless.sock")
    handover = Handover(tmp_path, URL)
    handover._look(folder)
    sock, _ = listener.accept()
    sock.sendall(WORDS)
    line = handover._lines["endless.sock"]
    await until(lambda: line.room_for(1) == 10)
    sock.setblocking(False)
    for _ in range(200):
        await asyncio.get_running_loop().sock_sendall(sock, Limits((1 << 64) - 1, (1 << 64) - 1).packed() * 1000)
    await asyncio.get_running_loop().sock_sendall(sock, Limits(7, 1 << 20).packed())
    await until(lambda: line.room_for(1) == 7)
    assert len(line._received) < 4096
    sock.close()
    listener.close()
    handover.close()
