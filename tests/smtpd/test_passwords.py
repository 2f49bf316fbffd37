"""Who may log in: a file that is understood or named as wrong, and passwords that are checked and never shown."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from pathlib import Path
from typing import Any

import pytest

from relay.smtpd.passwords import Users, hash_password

GOOD = hash_password("correct horse")


def written(folder: Path, text: str) -> Path:
    path = folder / "users"
    path.write_text(text, encoding="utf-8")
    return path


def test_passwords(tmp_path: Path) -> None:
    """The right password of the right user, each time; nothing else."""
    users = Users.read(written(tmp_path, f"# who may\n\nann:{GOOD}\nbob@example.com:{hash_password('ü')}\n"))

    async def check() -> None:
        for _ in range(2):
            assert await users.check("ann", "correct horse")
            assert await users.check("bob@example.com", "ü")
            for name, password in (
                ("ann", "ü"),
                ("ann", ""),
                ("eve", "correct horse"),
                ("", ""),
                ("ANN", "correct horse"),
            ):
                assert not await users.check(name, password)
        assert not await users.check("ann", "x" * 100_000)

    asyncio.run(check())
    assert len(users) == 2


@pytest.mark.parametrize(
    "line",
    [
        "ann",
        ":" + GOOD,
        "ann:correct horse",
        "ann:$scrypt$ln=2,r=8,p=1$AAAAAAAAAAA$" + "A" * 43,
        "ann:$scrypt$ln=30,r=8,p=1$AAAAAAAAAAA$" + "A" * 43,
        "ann:$2b$12$abcdefghijklmnopqrstuv",
        f"bob:{GOOD}",
    ],
    ids=["no hash", "no name", "no scrypt", "too weak", "too costly", "bcrypt", "twice"],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    """The reason says which line it is, and not what stands in it."""
    path = written(tmp_path, f"bob:{GOOD}\n{line}\n")
    with pytest.raises(ValueError, match=rf"{path}:2: expected") as caught:
        Users.read(path)
    assert "horse" not in str(caught.value)


def test_no_utf8(tmp_path: Path) -> None:
    """So does a file in another encoding."""
    (tmp_path / "users").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is not UTF-8"):
        Users.read(tmp_path / "users")


class _Counting:
    """hashlib's scrypt, with a count of its calls and of how many ran at once."""

    def __init__(self) -> None:
        self.calls = self.running = self.most = 0
        self._lock = threading.Lock()
        self._scrypt = hashlib.scrypt

    def __call__(self, *args: Any, **options: Any) -> bytes:
        with self._lock:
            self.calls += 1
            self.running += 1
            self.most = max(self.most, self.running)
        try:
            return self._scrypt(*args, **options)
        finally:
            with self._lock:
                self.running -= 1


@pytest.fixture
def scrypt(monkeypatch: pytest.MonkeyPatch) -> _Counting:
    counting = _Counting()
    monkeypatch.setattr(hashlib, "scrypt", counting)
    return counting


def test_an_unknown_name_costs_as_much_as_a_known_one(tmp_path: Path, scrypt: _Counting) -> None:
    """Time does not tell who is a user: for each name one hash is made, with the same parameters."""
    users = Users.read(written(tmp_path, f"ann:{GOOD}\n"))
    for name in ("ann", "eve"):
        before = scrypt.calls
        assert not asyncio.run(users.check(name, "wrong"))
        assert scrypt.calls == before + 1


def test_guessing_takes_four_threads_and_no_more(tmp_path: Path, scrypt: _Counting) -> None:
    """However many guess at the same time, four passwords are checked at once: each takes 16 MiB."""
    users = Users.read(written(tmp_path, f"ann:{GOOD}\n"))

    async def guess() -> None:
        assert not any(await asyncio.gather(*(users.check("ann", f"guess {n}") for n in range(20))))

    asyncio.run(guess())
    assert scrypt.calls == 20
    assert 1 < scrypt.most <= 4
