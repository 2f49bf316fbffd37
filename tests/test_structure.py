"""The rooms: imports point one way, each library has one door, and an import inside a function says why it is there."""

from __future__ import annotations

import ast
import itertools
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
    "aiosmtplib": {"relay/client/connect.py"},
    "aiosmtpd": {"relay/smtpd/proxy_protocol.py", "relay/demo/servers.py"},
    "dynaconf": {"relay/config/file.py"},
    "ctypes": {"relay/parent_death.py"},
    "fcntl": {"relay/private_files.py", "relay/daemon/start.py"},  # the latter's lock is not inherited by children
}
# What must not be written a second time -> where it stands.
ONE_OF_EACH = {
    r"\bO_CREAT\b|\.write_(?:text|bytes)\(": {
        "relay/private_files.py",
        "relay/command/export.py",  # into an operator's folder: it stays whose command it was
        "relay/faultpoints.py",  # in tests only
        "relay/demo/main.py",  # in a temporary folder of its own
    },
    r"\bos\.fsync\(": {
        "relay/private_files.py",
        "relay/spool/writer.py",  # of folders, shared by many changes
        "relay/redisio/aof.py",  # of Redis's own file
    },
    r"pause \* 2\b": {
        "relay/repeated.py",
        "relay/client/session_refusals.py",  # a pause for each kind of refusal, not of a loop
        "relay/daemon/slots.py",  # a pause for each child
        "relay/breaker.py",  # a pause for each destination
    },
    r"\.call_soon\(self\._take_off": {"relay/gathering.py"},
    r"\.capitalize\(\)": set(),  # it makes all other letters small, those of names, too
    # Stored data is parsed by relay.mail.stored.parsed, which has one exception for all that can be wrong.
    r"\bjson\.loads?\(": {
        "relay/event_ring.py",  # these: memory that only our processes share
        "relay/metric_store.py",
        "relay/daemon/child_status.py",
        "relay/demo/display.py",  # the log of the demo's own child
        "relay/trace/collector.py",  # datagrams of our own processes, thousands a second
    },
}
SOURCES = {path: path.read_text(encoding="utf-8") for path in MODULES}
_CLASS = re.compile(r"^class ([A-Za-z]\w*)", re.MULTILINE)
_INDENTED_IMPORT = re.compile(r"(?:^[ \t]+|[:;][ \t]*)(?:import|from)\b", re.MULTILINE)
_REASON = re.compile(r"# noqa: [A-Z0-9, ]*PLC0415  \(\S.+\)")
_SUPPRESSED = re.compile(r"# (?:noqa|type: ignore)\b(?!(?:: [A-Z0-9, ]+|\[[a-z, -]+\])(?: - |  \(|  # )\S)")


def _libraries(path: Path) -> set[str]:
    return {name.partition(".")[0] for _, name in _imports(ast.parse(SOURCES[path]))}


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
    named = [path for path in MODULES if library in SOURCES[path]]  # whoever imports it names it: few are parsed
    found = {str(path.relative_to(ROOT)) for path in named if library in _libraries(path)}
    assert found <= DOORS[library]


@pytest.mark.parametrize("pattern", sorted(ONE_OF_EACH))
def test_one_of_each(pattern: str) -> None:
    """A file is replaced, a pause grows, and what comes together leaves together by the code of one module each."""
    found = {str(path.relative_to(ROOT)) for path in MODULES if re.search(pattern, SOURCES[path])}
    assert found == ONE_OF_EACH[pattern]


def test_each_class_has_a_name_of_its_own() -> None:
    """Whoever reads a name in a message, or looks it up, finds one class."""
    places: dict[str, list[str]] = {}
    for path in MODULES:
        for name in _CLASS.findall(SOURCES[path]):
            places.setdefault(name, []).append(str(path.relative_to(ROOT)))
    assert len(places) > 200
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def test_an_import_inside_a_function_has_its_reason() -> None:
    """Such an import saves start-up time or an optional dependency, never a circle; the reason stands beside it."""
    for path in MODULES:
        if not _INDENTED_IMPORT.search(SOURCES[path]):
            continue
        lines = SOURCES[path].splitlines()
        for scope in ast.walk(ast.parse(SOURCES[path])):
            if not isinstance(scope, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            for node, name in _imports(scope):
                block = "\n".join(lines[node.lineno - 1 : node.end_lineno])
                assert _REASON.search(block), f"{path.relative_to(ROOT)}:{node.lineno}: {name}"


def test_what_silences_a_check_says_why() -> None:
    """Each ``noqa`` and ``type: ignore`` names the rule and has its reason beside it; a bare one hides anything."""
    rooms = ("relay", "workers", "bench", "tests", "deploy", "docs")
    files = [path for room in rooms for path in sorted((ROOT / room).rglob("*.py"))]
    bare = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in files
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if _SUPPRESSED.search(line) and path != Path(__file__).resolve()
    ]
    assert not bare


_MANY = re.compile(
    r" (?:of them |relay |failed |more )?(?:messages|copies|recipients|processes|addresses|entries|mailboxes|domains|"
    r"connections|files|jobs|servers|users|keys|times|workers|hosts|groups)\b"
)
_NUMBERED = re.compile(r'\}(?:"\s*f?")?' + _MANY.pattern)  # in an f-string, which may go on in the next line
_NEVER_ONE = {  # what stands before such a word there is never a single 1
    "len(values)",  # given twice or more
    "self._count",  # told from the second time on
    "count",  # bulk_preview.copies: 1 is said otherwise
    "every",  # "3 of 5"
    "seen.most",  # more than the most that a server takes
    "len(hanging)",  # several at once
    "found.rate",  # 1 is said otherwise
    "e.ready.max_slower",  # a factor
    "found.messages_a_second",  # a rate
}


def test_one_is_singular() -> None:
    """No text says "1 messages": numbers of things are said by relay.mail.text.count, unless they are never 1."""
    wrong = []
    for path in (path for path in MODULES if _NUMBERED.search(SOURCES[path])):
        for text in (node for node in ast.walk(ast.parse(SOURCES[path])) if isinstance(node, ast.JoinedStr)):
            for number, after in itertools.pairwise(text.values):
                if not isinstance(number, ast.FormattedValue) or not isinstance(after, ast.Constant):
                    continue
                place = text.values.index(number)
                before = text.values[place - 1] if place else None
                is_part = isinstance(before, ast.Constant) and str(before.value).endswith(" of ")
                said = ast.unparse(number.value)
                if _MANY.match(str(after.value)) and not is_part and said not in _NEVER_ONE and not said.isupper():
                    wrong.append(f"{path.relative_to(ROOT)}:{text.lineno}: {said}{after.value}")
    assert not wrong
