"""Plots of a row as PNG files. Without matplotlib there are none, and the report says so."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.results import Curve, Row


def draw(row: Row, folder: Path) -> bool:
    """Draw a row's bars and curves into ``<row>-<what>.png``. Returns whether that was possible."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    if any(figure.metric in row.bars for figure in row.figures):
        _bars(row, folder / f"{row.name}-bars.png")
    for plot in dict.fromkeys(curve.plot for curve in row.curves):
        curves = [curve for curve in row.curves if curve.plot == plot]
        name = plot.replace(" ", "-").replace(",", "")
        _curves(row, plot, curves, folder / f"{row.name}-{name}.png")
    return True


def _canvas(size: tuple[float, float]) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # noqa: PLC0415  (may not be installed)

    figure = Figure(figsize=size)  # no pyplot: no display, nothing kept in memory
    return figure, figure.subplots()


def _bars(row: Row, path: Path) -> None:
    metrics = [metric for metric in row.bars if any(f.metric == metric for f in row.figures)]
    subjects = list(dict.fromkeys(f.subject for f in row.figures if f.metric in metrics))
    figure, axes = _canvas((9, 1 + 0.5 * len(subjects)))
    height = 0.8 / len(metrics)
    for n, metric in enumerate(metrics):
        for place, subject in enumerate(subjects):
            found = next((f for f in row.figures if (f.subject, f.metric) == (subject, metric)), None)
            if found is None:
                continue
            low, high = found.median - min(found.values), max(found.values) - found.median
            label = metric if place == 0 else None
            axes.barh(place + n * height, found.median, height, xerr=[[low], [high]], color=f"C{n}", label=label)
            axes.annotate(f" {found.median:,.0f}", (max(found.values), place + n * height), va="center", fontsize=8)
    axes.set_yticks([place + 0.4 - height / 2 for place in range(len(subjects))], subjects)
    axes.invert_yaxis()
    axes.set_xlabel(next(f.unit for f in row.figures if f.metric in metrics))
    _finish(figure, axes, row.title, path)


def _curves(row: Row, plot: str, curves: Sequence[Curve], path: Path) -> None:
    figure, axes = _canvas((9, 4.5))
    for curve in curves:
        if plot.startswith("distribution"):
            ordered = sorted(curve.x)
            shares = [(n + 1) / len(ordered) for n in range(len(ordered))]
            axes.step(ordered, shares, where="post", label=curve.label)
        else:
            axes.plot(curve.x, curve.y, label=curve.label)
    if plot.startswith("distribution"):
        axes.set_xscale("log")
        axes.set_xlabel("ms")
        axes.set_ylabel("share of the messages")
    else:
        axes.set_xlabel("seconds")
        axes.set_ylim(bottom=0)
    _finish(figure, axes, f"{row.title}: {plot}", path)


def _finish(figure: Any, axes: Any, title: str, path: Path) -> None:
    axes.set_title(title, fontsize=10)
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
