"""Files that are written as a whole, and locks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from relay import private_files


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    """It is readable for nobody else, and nothing is left beside it; its temporary name is this process's own."""
    (tmp_path / "file").write_bytes(b"before")
    private_files.write(tmp_path, "file", b"x" * 3_000_000)
    assert (tmp_path / "file").read_bytes() == b"x" * 3_000_000
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o600
    assert _names(tmp_path) == ["file"]


def test_what_a_killed_process_left_is_in_nobodys_way(tmp_path: Path) -> None:
    """Neither another's half-written file, nor one of an earlier process with our number, nor a link there."""
    (tmp_path / ".file.1.tmp").write_bytes(b"half")
    ours = tmp_path / f".file.{os.getpid()}.tmp"
    ours.symlink_to(tmp_path / "elsewhere")
    private_files.write(tmp_path, "file", b"whole")
    assert (tmp_path / "file").read_bytes() == b"whole"
    assert _names(tmp_path) == [".file.1.tmp", "file"]
    assert not (tmp_path / "elsewhere").exists()


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    """The file is as it was, and no half of another lies beside it."""
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):  # noqa: PT011 - which one is the system's
        private_files.write(tmp_path, "folder", b"text")
    assert _names(tmp_path) == ["folder"]


def test_a_file_like_another(tmp_path: Path) -> None:
    """Its mode stays what an operator made it."""
    path = tmp_path / "file"
    path.write_bytes(b"before")
    path.chmod(0o640)
    private_files.write(tmp_path, "file", b"after", like=path.stat())
    assert path.read_bytes() == b"after"
    assert path.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("0123456789abcdef", "0123456789abcdef"),
        (".0123456789abcdef.4711.tmp", "0123456789abcdef"),
        ("0123456789abcdef.tmp", "0123456789abcdef"),
        (".other.tmp", ".other"),
        ("0123456789abcdef.4711", "0123456789abcdef.4711"),
    ],
)
def test_whose_half_written_file_it_is(name: str, written: str) -> None:
    """As it is called now, and was called in 0.1.0."""
    assert private_files.written(name) == written


def test_a_lock_is_one_processs(tmp_path: Path) -> None:
    """Locked by one, neither taken nor shared by another; free again once closed. Several may share it."""
    path = tmp_path / "lock"
    first = private_files.open_locked(path)
    for shared in (False, True):
        with pytest.raises(BlockingIOError):
            private_files.open_locked(path, shared=shared)
    os.close(first)
    both = [private_files.open_locked(path, shared=True) for _ in range(2)]
    with pytest.raises(BlockingIOError):
        private_files.open_locked(path)
    for descriptor in both:
        os.close(descriptor)
    os.close(private_files.open_locked(path))


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
