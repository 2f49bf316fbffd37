"""What the figures were taken on: cores, memory, disk with the cost of an fsync, versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import psutil

from relay.redisio import embedded

_FSYNCS = 100


def describe() -> dict[str, str]:
    """Return name -> text, in the order in which it is shown."""
    folder = Path(tempfile.gettempdir())
    found = {
        "CPU": f"{os.cpu_count()} x {_cpu()}",
        "memory": f"{psutil.virtual_memory().total / 1e9:.0f} GB",
        "system": f"{platform.system()} {platform.release()}",
        "temporary files": f"{_file_system(folder)}; write of 4 KB and fsync {fsync_ms(folder):.2f} ms (median)",
        "Python": f"{platform.python_version()}, {'shared library' if _is_shared() else 'one program'}",
        "Redis": _output([str(embedded.find_server()), "--version"]),
        "Postfix": _output(["postconf", "-h", "mail_version"]) or "not installed",
    }
    for name in ("aiosmtpd", "aiosmtplib", "rq", "redis", "hiredis", "uvloop"):
        found[name] = _version(name)
    load = ", ".join(f"{n:.1f}" for n in os.getloadavg())
    found["load when it began"] = f"{load} (1, 5, 15 minutes)"
    return found


def warnings() -> list[str]:
    """Say what makes figures of this machine worthless at this moment."""
    found = []
    if _file_system(Path(tempfile.gettempdir())).startswith("tmpfs"):
        found.append("temporary files are in memory: fsync costs nothing here; set TMPDIR to a folder on a disk")
    if os.getloadavg()[0] > 0.5 * (os.cpu_count() or 1):
        found.append("the machine was busy before the benchmark began")
    return found


def fsync_ms(folder: Path) -> float:
    """Return the median time of appending 4 KB and fsync, in milliseconds."""
    times = []
    with tempfile.TemporaryFile(dir=folder) as target:
        for _ in range(_FSYNCS):
            begun = time.perf_counter()
            target.write(b"x" * 4096)
            target.flush()
            os.fsync(target.fileno())
            times.append(time.perf_counter() - begun)
    return statistics.median(times) * 1000


def _is_shared() -> bool:
    """Say whether the interpreter is a shared library, which costs it up to a fifth where it is not built for speed."""
    return bool(sysconfig.get_config_var("Py_ENABLE_SHARED"))


def _file_system(folder: Path) -> str:
    best = max(
        (p for p in psutil.disk_partitions(all=True) if folder.resolve().is_relative_to(p.mountpoint)),
        key=lambda p: len(p.mountpoint),
        default=None,
    )
    return best.fstype if best else "unknown"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), sys.platform)


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
