"""The house: imports point one way, so that the relay can be read, and run, without the workers."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
# The composition root and the commands know both sides, each where it needs them.
ROOTS = {"composition.py"}


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) else []


def test_the_relay_does_not_import_the_workers() -> None:
    """No module of the relay imports one of the workers, but for the composition root, within its functions."""
    for path in sorted((ROOT / "relay").glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        checked = tree.body if path.name in ROOTS else ast.walk(tree)
        for node in checked:
            found = [name for name in _imported(node) if name.partition(".")[0] == "workers"]
            assert not found, f"{path.name} imports {found[0]}"


def test_only_the_settings_file_knows_dynaconf() -> None:
    """The library that reads the file is behind one module."""
    for path in [*(ROOT / "relay").glob("*.py"), *(ROOT / "workers").glob("*.py")]:
        if path.name != "settings_file.py":
            tree = ast.parse(path.read_text(encoding="utf-8"))
            assert not [n for n in ast.walk(tree) if "dynaconf" in " ".join(_imported(n))], path.name
