"""Who may log in: a file that is understood or named as wrong, and passwords that are checked and never shown."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from relay.users import Users, hash_password

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
