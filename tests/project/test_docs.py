"""The documentation is true: every block of it is read, parsed or run, every name in it exists."""

from __future__ import annotations

import json
import os
import plistlib
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, NamedTuple

import click
import pytest
import yaml

from relay.command import commands
from relay.config.layers import CONFIG_VARIABLE, DEFAULTS_VARIABLE
from relay.config.loader import load
from relay.config.options import BY_KEY, OPTIONS
from relay.monitoring.probes import probe_redis
from support import documents, forked
from support.documents import ROOT, Block
from support.product import Product
from support.redis_servers import RedisServer
from support.scripted_server import ScriptedServer
from support.waiting import wait_until

BLOCKS = list(documents.blocks())
# Variables of the pages that hold a password, and what is no option although it looks like one.
PASSWORDS = {"OLD_PASSWORD": "secret", "NEW_PASSWORD": "secret"}
OTHER_VARIABLES = {CONFIG_VARIABLE, DEFAULTS_VARIABLE, "SMTP_DUP_NEW_PASSWORD", "SMTP_DUP_"}
UNKNOWN = "550 5.1.1 no such mailbox"


def named(language: str, *kinds: str) -> Any:
    """Return a parameter for each block of this language (and with one of these markers)."""
    found = [b for b in BLOCKS if b.language == language and (not kinds or b.kind in kinds)]
    return pytest.mark.parametrize("block", found, ids=str)


def test_every_block_says_what_to_do_with_it() -> None:
    """No block goes untested by a slip of its language or its marker."""
    strange = [str(b) for b in BLOCKS if b.language not in documents.LANGUAGES or b.kind not in documents.MARKERS]
    assert not strange
    assert len(BLOCKS) > 60
    # A fence that the reader of fences does not see would not be tested either.
    assert 2 * len(BLOCKS) == sum(len(re.findall(r"(?m)^ *```", p.read_text("utf-8"))) for p in documents.PAGES)


# Settings


def read_settings(text: str, suffix: str, folder: Path) -> None:
    path = folder / f"settings{suffix}"
    # A file that a server's options name must be there.
    path.write_text(re.sub(r"file:/[\w/.-]+", f"file:{path}", text), encoding="utf-8")
    load({"config": str(path)}, dict(PASSWORDS), require_primary=False)


@named("toml")
def test_toml_is_settings(block: Block, tmp_path: Path) -> None:
    """Every TOML block can be used as settings.toml."""
    read_settings(block.text, ".toml", tmp_path)


@named("yaml")
def test_yaml_is_what_it_looks_like(block: Block, tmp_path: Path) -> None:
    """Settings unless its keys say otherwise."""
    content = yaml.safe_load(block.text)
    if (
        "services" in content
        or "kind" in content
        or "scrape_configs" in content
        or block.kind in {"manifest", "kustomize-redis"}
    ):
        return  # compose and manifests have their own tests; Prometheus reads its part in test_deploy.py
    read_settings(block.text, ".yaml", tmp_path)


def test_the_tables_are_those_of_the_options() -> None:
    """`python docs/site/reference.py` would change nothing."""
    renew = runpy.run_path(str(ROOT / "docs" / "site" / "reference.py"))["renew"]
    pages = [ROOT / "docs" / name for name in ("configuration.md", "environment.md")]
    for path in pages:
        text = path.read_text(encoding="utf-8")
        assert renew(text) == text, f"{path.name}: run python docs/site/reference.py"
    text = "".join(path.read_text(encoding="utf-8") for path in pages)
    assert all(f"| `{option.key}` |" in text and f"`{option.variables[0]}`" in text for option in OPTIONS)


def test_the_launch_agent() -> None:
    """It is a property list whose command is ours and which leaves a drain its time."""
    (block,) = documents.of("plist")
    agent = plistlib.loads(block.text.encode())
    check_command(agent["ProgramArguments"][1:])
    assert agent["ProgramArguments"][0].endswith("/smtp-dup")
    assert agent["ExitTimeOut"] > 900  # the supervisor's drain_seconds


# Names


def check_command(words: list[str]) -> None:
    """Parse a command line as the command does. Raises click.UsageError or ValueError."""
    task = commands.parse(words)
    if isinstance(task, int):
        return  # --help, --version
    assert not task.given.problems, [str(problem) for problem in task.given.problems]
    for key, value in task.given.flags.items():
        if key in BY_KEY:
            BY_KEY[key].kind.read(value)


@named("sh")
def test_shell_is_shell_and_its_commands_are_ours(block: Block) -> None:
    """bash can read it, and smtp-dup's parser takes every command line in it."""
    done = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True, check=False)
    assert not done.stderr, done.stderr
    for words in documents.commands(block.text):
        check_command(words)
    for name in re.findall(r"\bSMTP_DUP_\w+", block.text):
        check_variable(name)


def check_variable(name: str) -> None:
    assert name in {v for option in OPTIONS for v in option.variables} | OTHER_VARIABLES, name


def test_the_commands_that_sentences_name_exist() -> None:
    """`smtp-dup queue flush` in a sentence is a command."""
    for page, code in documents.inline():
        if re.match(r"smtp-dup( |$)", code) and "..." not in code:
            for words in documents.commands(code):
                try:
                    check_command([*words, "check"] if words and words[0].startswith("-") else words)
                except click.UsageError:
                    if words not in (["queue"], ["failed"], []):
                        pytest.fail(f"{page}: {code}")


def test_the_options_and_variables_that_sentences_name_exist() -> None:
    """`smtp.max_hops` and SMTP_DUP_SMTP_MAX_HOPS in a sentence are an option and its variable."""
    sections = "|".join({key.partition(".")[0] for key in BY_KEY if "." in key})
    for page, code in documents.inline():
        if page == "json.md":  # its `spool.messages` are fields; tests/command/test_json.py compares them
            continue
        if re.fullmatch(rf"({sections})\.[a-z_]+", code) and not code.endswith((".conf", ".toml", ".yaml", ".service")):
            assert code in BY_KEY, f"{page}: {code}"
        for name in re.findall(r"\bSMTP_DUP_\w*", code):
            check_variable(name)


PLAIN = {"README.md", "index.md", "changelog.md", "license.md"}


@pytest.mark.parametrize("path", [p for p in documents.PAGES if p.name not in PLAIN], ids=lambda p: p.name)
def test_a_page_says_what_for_how_and_how_far(path: Path) -> None:
    """Purpose, principle, what speaks for and against it, and its limits."""
    text = path.read_text(encoding="utf-8")
    for pattern in (
        r"(?m)^\*\*Purpose\.\*\* ",
        r"(?m)^\*\*Principle\.\*\* ",
        r"\*\*For and against\.\*\*|(?m:^## For and against)|\| for +\|",
        r"(?m)^## (Limits|What is not defended)",
    ):
        assert re.search(pattern, text), pattern


def test_the_architecture_is_that_of_today() -> None:
    """Every file that docs/architecture.md names is there, and one message's life names at most ten."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for place in re.findall(r"`((?:relay|workers)/[\w/]+(?:\.py|\.lua|/))`", text):
        assert (ROOT / place).exists(), place
    steps = re.findall(r"(?m)^\d+\. `((?:relay|workers)/[\w/]+\.py)`", text)
    assert 5 <= len(steps) <= 10


def test_files_that_are_named_are_there() -> None:
    """Pages name files of the tree by their path; docstrings and comments of the code by the end of it, or the name."""
    code = [path for room in ("relay", "workers") for path in sorted((ROOT / room).rglob("*"))]
    ends = {"/".join(path.parts[-n:]) for path in code for n in range(1, 5)}
    for path in (path for path in code if path.suffix in {".py", ".lua"}):
        for end in re.findall(r"(?<![\w/.<-])(?:[a-z_]+/)*[a-z_]+\.(?:py|lua)\b", path.read_text("utf-8")):
            assert end in ends or (ROOT / end).exists(), f"{path.name}: {end}"
    for path in documents.PAGES:
        for place in re.findall(r"`((?:relay|workers|tests|deploy)/[\w./-]+)`", path.read_text("utf-8")):
            assert (ROOT / place).exists(), f"{path.name}: {place}"


def test_links_out_of_the_docs_lead_somewhere() -> None:
    """MkDocs checks the links between pages; these are the others."""
    for path in documents.PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)", path.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (path.parent / target).exists(), f"{path.name}: {target}"


# Run


class Programs(NamedTuple):
    """What a shell needs for a `smtp-dup` that is the code under test: variables, and a descriptor to inherit."""

    variables: dict[str, str]
    descriptor: int


@pytest.fixture
def programs(tmp_path: Path) -> Programs:
    """A folder with a `smtp-dup` that is the code under test."""
    folder = tmp_path / "bin"
    folder.mkdir()
    return Programs(*forked.program(folder))


@pytest.fixture
def site(product: Callable[..., Product], primary: ScriptedServer, backup: ScriptedServer) -> Product:
    """A running product whose backup `new` refuses one user and defers another."""
    backup.replies["RCPT TO:<unknown@example.com>"] = UNKNOWN
    backup.replies["RCPT TO:<later@example.com>"] = "450 4.2.0 greylisted"
    table = f'[[backup]]\nname = "new"\nurl = "{backup.address}"\n'
    instance = product(primary=f"old={primary.address}", files={"settings.toml": table})
    for user in ("unknown", "later", "bob"):
        instance.send("alice@example.net", f"{user}@example.com")
    wait_failed(instance)
    return instance


def wait_failed(instance: Product) -> list[dict[str, Any]]:
    """Wait until one has failed and nothing is in hand; return the failed list."""
    wait_until(lambda: (row := instance.summary())["failed"] == row["retrying"] == row["pending"] == 1)
    return instance.json("failed", "list")


def run(instance: Product, text: str, programs: Programs) -> subprocess.CompletedProcess[str]:
    """Run a block as its reader would, in the folder and with the settings of this instance."""
    text = text.replace("127.0.0.1:8025", f"127.0.0.1:{instance.status_port}")
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text],
        cwd=instance.directory,
        env={**instance.environment, **programs.variables},
        pass_fds=[programs.descriptor],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("page", sorted({block.page for block in documents.of("run")}))
def test_commands_do_what_the_page_says(page: str, site: Product, programs: Programs) -> None:
    """The blocks of a page that are marked `run`, one after the other."""
    message = site.json("failed", "list")[0]["id"]
    if page == "trace.md":  # what is traced is written a moment later
        wait_until(lambda: site.run("trace", "bob@example.com").returncode == 0)
    for block in documents.of("run", page=page):
        if "| jq" in block.text and not shutil.which("jq"):
            pytest.skip("jq is not installed")
        done = run(site, re.sub(r"\bID\b", message, block.text), programs)
        status = int(block.words[1]) if len(block.words) > 1 else 0
        assert done.returncode == status, f"{block}\n{done.stdout}{done.stderr}"
        assert status or not done.stderr.replace("\n", "") or "curl" in block.text, f"{block}: {done.stderr}"
        if " drop " in block.text:
            wait_until(lambda: site.summary()["failed"] == 0)
        elif " retry " in block.text and "--dry-run" not in block.text.splitlines()[-1]:
            wait_failed(site)
        elif "failed export " in block.text:
            assert b"Subject: " in (site.directory / "message.eml").read_bytes()


class AsWritten(Product):
    """A product that is started by the text of a block."""

    text = ""
    programs: Programs

    def _launch(self, argv: list[str], log: IO[bytes]) -> subprocess.Popen[bytes]:
        # Its process is the product's: exec has the shell make place.
        text = re.sub(r"(?m)^smtp-dup up|(?<= )smtp-dup up", "exec smtp-dup up", self.text)
        return subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", text],
            cwd=self.directory,
            env={**self.environment, **self.programs.variables},
            pass_fds=[self.programs.descriptor],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


@pytest.mark.parametrize("block", documents.of("up"), ids=str)
def test_what_the_page_starts_relays_and_copies(block: Block, tmp_path: Path, programs: Programs) -> None:
    """Each way of a page to start it, with our servers in place of its names: mail reaches all that are named."""
    hosts = sorted(set(re.findall(r"[\w.-]+\.example\.com:25", block.text)))
    file = ""
    if block.words[1:]:
        (file,) = (b.text for b in documents.blocks() if b.page == block.page and f"# {block.words[1]}" in b.text)
        hosts = sorted(set(re.findall(r"[\w.-]+\.example\.com:25", file)))
    with ExitStack() as ends:
        servers = {host: ends.enter_context(ScriptedServer()) for host in hosts}
        assert len(servers) > 1
        primary = next(server for host, server in servers.items() if "old" in host or "primary" in host)

        instance = AsWritten(tmp_path)
        instance.programs = programs
        ends.callback(instance.clean_up)

        def ours(text: str) -> str:
            for host, server in servers.items():
                text = text.replace(host, server.address)
            return text.replace("127.0.0.1:2525", instance.address)

        if block.words[1:]:
            (tmp_path / block.words[1]).write_text(ours(file))
        instance.text = ours(block.text)
        instance.start()
        instance.send("alice@example.net", "bob@example.com")
        for server in servers.values():
            server.wait_for(1)
        assert instance.stop() == 0
        assert all(len(server.messages) == 1 for server in servers.values())
        assert primary.messages


def test_backup_and_restore(site: Product, programs: Programs) -> None:
    """What waited and what failed is there again after the two procedures of operations.md."""
    save, restore = documents.of("backup", page="operations.md")
    before = (site.json("queue", "list"), site.json("failed", "list"))
    follow(site, save, programs)
    assert tarfile.is_tarfile(site.directory / "smtp-dup.tar.gz")
    site.run("failed", "drop", "--all", "--yes")
    wait_until(lambda: not site.json("failed", "list"))
    follow(site, restore, programs)
    after = (site.json("queue", "list"), site.json("failed", "list"))
    assert json.dumps(before[1]) == json.dumps(after[1])
    assert [row["id"] for row in before[0]] == [row["id"] for row in after[0]]


def follow(instance: Product, block: Block, programs: Programs) -> None:
    """Do what a block says, with the product in place of the service and its state folder in place of the real one."""
    for line in block.text.splitlines():
        if line.startswith("systemctl "):
            _ = instance.stop() if "stop" in line else instance.start()
            continue
        state = str(instance.state_dir)
        line = line.replace("/var/lib/smtp-dup", state).replace("/var/lib smtp-dup", f"{instance.directory} state")  # noqa: PLW2901 - step by step
        line = line.replace("--directory /var/lib", f"--directory {instance.directory}")  # noqa: PLW2901 - step by step
        done = run(instance, line, programs)
        assert done.returncode == 0, f"{line}\n{done.stderr}"


async def test_the_redis_that_the_page_asks_for_is_enough(redis_factory: Callable[..., RedisServer]) -> None:
    """A server with these lines passes `smtp-dup check`."""
    (block,) = documents.of("redis.conf")
    words = dict(line.split() for line in block.text.splitlines())
    server = redis_factory(**{name.replace("-", "_"): value for name, value in words.items()})
    findings = await probe_redis(load({"relay.destination_primary": "old.example.com"}, {}, ()), server.url)
    assert len(findings) > 4
    assert [f.text for f in findings if not f.ok] == []


# The site


def test_the_picture_shows_what_the_demo_shows() -> None:
    """docs/demo.svg has the words of a demo of now; else run `python docs/site/picture.py`."""
    program = "import runpy, sys; m = runpy.run_path('docs/site/picture.py'); sys.stdout.write(m['draw'](m['watch']()))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, timeout=90, check=True)
    now, then = done.stdout.decode(), (ROOT / "docs" / "demo.svg").read_text("utf-8")
    assert now.count("<text") > 20
    assert re.findall(r"<text[^>]*>(.*?)</text>", now) == re.findall(r"<text[^>]*>(.*?)</text>", then)


def test_the_diagrams_are_those_that_the_script_draws() -> None:
    """`python docs/site/diagrams.py` would change nothing: the plots show the figures of the page."""
    drawn = runpy.run_path(str(ROOT / "docs" / "site" / "diagrams.py"))["pictures"]()
    kept = {path.name: path.read_text("utf-8") for path in (ROOT / "docs" / "images").glob("*.svg")}
    assert kept == drawn
    assert all(figure in kept["throughput.svg"] for figure in ("smtp-dup", "Postfix with a bcc copy"))


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """Every page is in the menu, every link and anchor between pages leads somewhere."""
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site"),
         "--config-file", str(ROOT / "docs" / "site" / "mkdocs.yml")],
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {path.parent.name for path in (tmp_path / "site").glob("*/index.html")}
    assert {path.stem for path in documents.PAGES[1:]} - {"index"} <= pages
