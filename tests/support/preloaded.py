"""A few lines of C that are loaded into a process before libc, so that it finds the machine as a test wants it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path


class NotThere(Exception):
    """It cannot be had here; the text says why."""


def compiled(source: Path, folder: Path) -> Path:
    """Return the library made of a source. Raises NotThere."""
    compiler = shutil.which("cc")
    if compiler is None:
        raise NotThere("needs a C compiler")
    library = folder / source.with_suffix(".so").name
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise NotThere(f"the C compiler says {done.stderr.strip()[-300:]}")
    return library
