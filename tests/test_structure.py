"""The rooms: imports point one way, each library has one door, and an import inside a function says why it is there."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = [path for top in ("relay", "workers") for path in sorted((ROOT / top).rglob("*.py"))]
# Libraries that one module each stands for; see docs/architecture.md.
DOORS = {
    "aiosmtpd": {"relay/smtpd/proxy_protocol.py", "relay/demo/servers.py"},
    "aiosmtplib": {"relay/client/connect.py"},
    "dynaconf": {"relay/config/file.py"},
}
_REASON = re.compile(r"# noqa: [A-Z0-9, ]*PLC0415  \(\S.+\)")


def _imports(tree: ast.AST) -> Iterator[tuple[ast.stmt, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node, node.module or ""


def test_each_room_imports_only_what_is_below_it() -> None:
    """The contracts in pyproject.toml hold, without an exemption."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert "ignore_imports" not in text
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("library", sorted(DOORS))
def test_a_library_is_imported_by_its_module_alone(library: str) -> None:
    """What a library's next version changes concerns one file."""
    found = {
        str(path.relative_to(ROOT))
        for path in MODULES
        if any(name.partition(".")[0] == library for _, name in _imports(ast.parse(path.read_text(encoding="utf-8"))))
    }
    assert found <= DOORS[library]


def test_an_import_inside_a_function_has_its_reason() -> None:
    """Such an import saves start-up time or an optional dependency, never a circle; the reason stands beside it."""
    for path in MODULES:
        source = path.read_text(encoding="utf-8")
        lines = source.splitlines()
        for scope in ast.walk(ast.parse(source)):
            if not isinstance(scope, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            for node, name in _imports(scope):
                block = "\n".join(lines[node.lineno - 1 : node.end_lineno])
                assert _REASON.search(block), f"{path.relative_to(ROOT)}:{node.lineno}: {name}"
