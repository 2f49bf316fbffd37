"""What a run over several processes lacks: bytecode that they share, and the reason why nothing was run.

Each process of pytest-xdist collects all tests for itself. In a new checkout each would compile them for itself, too,
which is a minute of processor time for what one of them could do; and what keeps one from collecting anything (a file
that is not there, `-k` that nothing matches) is written nowhere.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

import pytest


def is_parallel(config: pytest.Config) -> bool:
    """Return whether other processes run the tests for this one."""
    return not hasattr(config, "workerinput") and bool(getattr(config.option, "numprocesses", None))


def refuse_what_is_not_there(config: pytest.Config) -> None:
    """Raise UsageError for a path that does not exist, before any process has looked for it."""
    for arg in config.args:
        path = config.invocation_params.dir / str(arg).partition("::")[0]
        if not config.option.pyargs and not path.exists():
            raise pytest.UsageError(f"file or directory not found: {arg}")


def share_bytecode(config: pytest.Config) -> None:
    """Have bytecode written where none is, elsewhere and for this run: whatever tests start does not compile it all."""
    if sys.dont_write_bytecode and not hasattr(config, "workerinput"):
        folder = tempfile.TemporaryDirectory(prefix="smtp-dup-pycache-")  # the environment of whatever is started
        os.environ["PYTHONPYCACHEPREFIX"] = folder.name
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        config.add_cleanup(folder.cleanup)


def compile_tests(config: pytest.Config) -> None:
    """Compile all tests where that was not done before, half of them in each of two processes.

    Only pytest compiles its tests as it wants them, with assertions rewritten, and only while it collects.
    """
    tests = config.rootpath / "tests"
    done = any((tests / "__pycache__").glob("test_structure.*pytest*")) and not sys.dont_write_bytecode
    if done or [str(arg).rstrip("/") for arg in config.args] not in (["tests"], [str(tests)]):
        return
    rooms = sorted(path for path in tests.iterdir() if any(path.glob("test_*.py")) or path.match("test_*.py"))
    halves = [_collection(config, *map(str, rooms[n::2]), stdout=subprocess.DEVNULL) for n in range(2)]
    for process in halves:
        process.wait()  # what is wrong with a file is told by the processes that run the tests


def reason_for_nothing(config: pytest.Config) -> str:
    """Return what pytest says of these arguments when it collects in one process."""
    args = [str(arg) for arg in config.invocation_params.args]
    process = _collection(config, *args, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return process.communicate()[0].decode("utf-8", "replace").strip()


def _collection(config: pytest.Config, *args: str, stdout: int, stderr: int | None = None) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", "pytest", *args, "-n", "0", "--collect-only", "-q"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    folder = config.invocation_params.dir
    return subprocess.Popen(words, cwd=folder, env=environment, stdout=stdout, stderr=stderr)
