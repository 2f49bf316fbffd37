"""Debian packages without their installation: fetched by apt, or found where somebody has put them before.

SMTPDUP_TEST_PACKAGES names that folder, for machines without a network and so that a test run fetches nothing twice.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
from pathlib import Path

_SECONDS = 120


class NotThere(Exception):
    """A package cannot be had here; the text says why."""


def unpack(folder: Path, *names: str) -> None:
    """Unpack binary packages below ``folder``, over each other, as an installation would. Raises NotThere."""
    if shutil.which("dpkg") is None:
        raise NotThere("needs dpkg")
    for name in names:
        found = _found(f"{name}_*.deb") or _fetched(folder, ["apt-get", "-qq", "download", name], f"{name}_*.deb")
        _run(["dpkg", "-x", str(found), str(folder)], folder)


def unpack_source(folder: Path, name: str) -> Path:
    """Unpack what the authors of a package have published below ``folder``; return where. Raises NotThere."""
    found = _found(f"{name}_*.orig.tar.*")
    if found is None:
        lists = _source_lists(folder)
        _run(["apt-get", "-qq", *lists, "update"], folder)
        source = ["apt-get", "-qq", *lists, "source", "--download-only", name]
        found = _fetched(folder, source, f"{name}_*.orig.tar.*")
    with tarfile.open(found) as archive:
        for member in archive:
            content = archive.extractfile(member) if member.isfile() else None  # links may lead anywhere
            if content is not None and ".." not in Path(member.name).parts:
                path = folder / member.name.lstrip("/")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content.read())
        return folder / archive.getnames()[0].partition("/")[0]


def _found(pattern: str) -> Path | None:
    folder = os.environ.get("SMTPDUP_TEST_PACKAGES")
    return next((p for p in sorted(Path(folder).glob(pattern)) if p.suffix != ".asc"), None) if folder else None


def _fetched(folder: Path, command: list[str], pattern: str) -> Path:
    if shutil.which("apt-get") is None:
        raise NotThere("needs apt-get")
    said = _run(command, folder, check=False)
    # Debian's own changes to a source may be gone while what they change is there; that is all we want.
    found = next((p for p in sorted(folder.glob(pattern)) if p.suffix != ".asc"), None)
    if found is None:
        raise NotThere(f"{command[-1]} cannot be had: {said.strip()[-300:]}")
    return found


def _source_lists(folder: Path) -> list[str]:
    """Return apt's options for the sources of what it has binaries of, apart from the system's own lists."""
    parts = folder / "sources"
    (folder / "lists" / "partial").mkdir(parents=True, exist_ok=True)
    parts.mkdir(exist_ok=True)
    given = Path("/etc/apt")
    for path in (given / "sources.list", *(given / "sources.list.d").glob("*")):
        if path.suffix == ".sources":
            lines = ["Types: deb-src" if line.startswith("Types:") else line for line in path.read_text().splitlines()]
        elif path.suffix == ".list" and path.exists():
            lines = [
                line.replace("deb ", "deb-src ", 1) for line in path.read_text().splitlines() if line[:4] == "deb "
            ]
        else:
            continue
        if any("debian" in line or "ubuntu" in line for line in lines):
            (parts / path.name).write_text("\n".join(lines) + "\n")
    return [
        *("-o", "Dir::Etc::SourceList=/dev/null", "-o", f"Dir::Etc::SourceParts={parts}"),
        *("-o", f"Dir::State::Lists={folder / 'lists'}"),
    ]


def _run(command: list[str], folder: Path, *, check: bool = True) -> str:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        raise NotThere(f"{command[0]}: {error}") from error
    if check and done.returncode:
        raise NotThere(f"{' '.join(command)}: {done.stderr.strip()[-300:]}")
    return done.stderr
