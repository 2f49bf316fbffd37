"""The report: Markdown for people, JSON for programs, in a folder of its own below bench/results/."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from bench import ROOT
from bench.results import Figure, Row

RESULTS = ROOT / "bench" / "results"


def folder() -> Path:
    """Make a folder for this call, named by the time."""
    path = RESULTS / datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    path.mkdir(parents=True, exist_ok=True)
    return path


def write(path: Path, rows: Sequence[Row], machine: Mapping[str, str], warnings: Sequence[str], command: str) -> Path:
    """Write report.md and results.json; called after every row, so that an interruption leaves what there is."""
    record = {"machine": dict(machine), "warnings": list(warnings), "command": command}
    text = json.dumps({**record, "rows": [row.to_json() for row in rows]}, indent=1)
    (path / "results.json").write_text(text + "\n")
    images = {image.stem for image in path.glob("*.png")}
    report = path / "report.md"
    report.write_text(markdown(rows, machine, warnings, command, images))
    return report


def markdown(
    rows: Sequence[Row], machine: Mapping[str, str], warnings: Sequence[str], command: str, images: set[str]
) -> str:
    parts = ["# Benchmark", f"`{command}`", _goals(rows)]
    parts += [f"**Warning:** {warning}." for warning in warnings]
    for row in rows:
        parts.append(f"## {row.title}")
        parts += [f"**FAULT:** {fault}" for fault in row.faults]
        parts.append(tables(row.figures))
        parts += [f"- {note}" for note in row.notes]
        parts += [f"![{name}]({name}.png)" for name in sorted(images) if name.startswith(f"{row.name}-")]
    parts += ["## The machine", _table(("what", ""), list(machine.items()))]
    return "\n\n".join(part for part in parts if part) + "\n"


def tables(figures: Sequence[Figure]) -> str:
    """Return subjects against metrics, one table for all subjects of which the same was measured.

    A cell is the median, and in parentheses the least and the greatest of the rounds.
    """
    measured: dict[str, dict[tuple[str, str], Figure]] = {}
    for figure in figures:
        measured.setdefault(figure.subject, {})[figure.metric, figure.unit] = figure
    parts = []
    for metrics in dict.fromkeys(tuple(found) for found in measured.values()):
        head = ("", *(f"{metric} ({unit})" if unit else metric for metric, unit in metrics))
        of = {subject: found for subject, found in measured.items() if tuple(found) == metrics}
        parts.append(_table(head, [(s, *(_cell(found[m]) for m in metrics)) for s, found in of.items()]))
    return "\n\n".join(parts)


def number(value: float) -> str:
    """Return a number with three significant digits, whole from 100 on."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _cell(figure: Figure) -> str:
    if len(figure.values) == 1:
        return number(figure.median)
    return f"{number(figure.median)} ({number(min(figure.values))}-{number(max(figure.values))})"


def _goals(rows: Sequence[Row]) -> str:
    body = [
        (
            goal.text,
            f"{'at least' if goal.at_least else 'at most'} {number(goal.limit)} {goal.unit}".rstrip(),
            f"{number(goal.measured)} {goal.unit}".rstrip(),
            "yes" if goal.met else "**no**",
        )
        for row in rows
        for goal in row.goals
    ]
    return _table(("what", "goal", "measured", "met"), body) if body else ""


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    if not body:
        return ""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
