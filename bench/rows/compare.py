"""Two commits of this repository side by side: ``python -m bench compare REV``."""

from __future__ import annotations

import io
import subprocess
import tarfile
from pathlib import Path

from bench import ROOT, peers
from bench.course import Course
from bench.results import Goal, Row
from bench.rows import cpu, throughput

_NOISE = 1.05  # a median that is no more than this above the other's is no difference


def run(course: Course) -> Row:
    """Run the working tree and a former commit under the same load, in turn, with the libraries that are installed."""
    revision = course.options.revision
    row = Row("compare", f"This tree against {revision}")
    with course.row(row, 2 * (course.options.rounds + 1) * len(throughput.MODES)) as stage:
        former = _checked_out(revision, stage.folder / "tree")
        products = [
            peers.smtp_dup(stage.stack, stage.folder, name="this tree"),
            peers.smtp_dup(stage.stack, stage.folder, name=revision, source=former),
        ]
        cpu.measure(course, stage, row, products)
        for mode in throughput.MODES:
            ours, theirs = (row.median(f"{peer.name}, {mode}", cpu.WHOLE) for peer in products)
            if ours and theirs:
                text = f"processor time a message against {revision}, {mode}"
                row.goals.append(Goal(text, ours / theirs, _NOISE, at_least=False, unit="x"))
    return row


def _checked_out(revision: str, folder: Path) -> Path:
    """Return a folder with the files of a commit."""
    command = ["git", "-C", str(ROOT), "archive", "--format=tar", revision]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        raise ValueError(f"{revision}: {done.stderr.decode(errors='replace').strip()}")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return folder
