"""Fixtures: real servers on loopback, each with a guaranteed end."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import redis

from relay import log_lines, ownership, private_files
from relay.mail import encryption, record
from support import (
    ended_loops,
    exim_instance,
    load,
    parallel_run,
    postfix_instance,
    preloaded,
    remembered,
    settable_clock,
)
from support.certificates import Certificate
from support.dns_server import DnsServer
from support.load import SmtpSink
from support.postfix_instance import PostfixInstance
from support.product import Product
from support.redis_servers import RedisServer
from support.scripted_server import ScriptedServer
from support.settable_clock import SettableClock
from support.waiting import free_port

# Files whose tests put the whole machine under load: never two of them at once.
_DEMANDING = (
    "test_failover", "test_soak", "test_several_hosts", "test_routes_on_several_hosts", "test_overload",
    "test_power_loss",
)  # fmt: skip
# Files with the longest tests, most of which wait: begun first, they go on beside what takes processor time.
_SLOW = (
    *_DEMANDING, "test_crash_matrix", "test_crash_matrix_of_routes", "test_outages", "test_postfix_crash",
    "test_isolation", "test_backup_leg", "test_cut_over", "test_failover_of_primaries", "test_hung_servers",
    "test_clocks", "test_promotion", "test_promotion_on_routes", "test_limits", "test_hangs", "test_fork",
)  # fmt: skip

_MUCH = 100_000  # objects more than there were
_kept = 0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--sealed", action="store_true", help="all stored mail is sealed: storage.key_file for everybody")
    parser.addoption("--long", action="store_true", help="the tests marked long, and no others")


def pytest_configure(config: pytest.Config) -> None:
    """Have what tests start hear SIGHUP and SIGINT, whoever has started them: what is ignored is inherited as that.

    Below nohup that is SIGHUP, for what a script has put in the background SIGINT.

    Starts of the product are forks, which take a fifth of the processor time.
    """
    parallel_run.share_bytecode(config)
    if parallel_run.is_parallel(config):
        parallel_run.refuse_what_is_not_there(config)
        parallel_run.compile_tests(config)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda *_: None)  # a handler is not inherited; we ourselves go on all the same
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    Product.forks = True
    remembered.remember()
    ended_loops.watch()
    # A busy machine makes no example wrong.
    hypothesis.settings.register_profile(
        "suite", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
    )
    hypothesis.settings.load_profile("suite")
    gc.disable()  # until all is collected: what that makes stays
    free_port()  # opens its file now, not between two counts of descriptors


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config) -> None:
    """Say why nothing was run, which the processes that were to run it do not."""
    if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and parallel_run.is_parallel(config):
        terminalreporter.write_line(parallel_run.reason_for_nothing(config))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Run more tests at once than there are cores: most of the time a test waits for a process or a deadline.

    Long ones load the machine by themselves: not so many of them.
    """
    cores = os.cpu_count() or 1
    return min(8, cores + 2 if config.getoption("--long") else cores * 3)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with what takes longest, so that the end is not one worker's; what wants the machine goes one by one."""
    is_long = config.getoption("--long")
    others = [item for item in items if bool(item.get_closest_marker("long")) != is_long]
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if bool(item.get_closest_marker("long")) == is_long]
    slow = {name: place for place, name in enumerate(_SLOW)}
    place: dict[pytest.Item, tuple[bool, int]] = {}
    for item in items:
        grouped = item.path.stem in _DEMANDING or _shares_a_fixture(item)
        if grouped:
            name = "demanding" if item.path.stem in _DEMANDING else item.path.stem
            item.add_marker(pytest.mark.xdist_group(name))
        place[item] = (not grouped, slow.get(item.path.stem, len(slow)))
    items.sort(key=place.__getitem__)  # a group is one worker's; stable: else the order stays


def pytest_collection_finish() -> None:
    """Leave alone what is there for the whole run: a collection of garbage looks at some hundred megabytes else."""
    global _kept  # noqa: PLW0603 - what is kept is the process's
    gc.collect()
    gc.freeze()
    gc.enable()
    _kept = sys.getallocatedblocks()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown() -> Generator[None]:
    """Fail the test that leaves a loop with something open in it: else one is blamed that runs when it is collected."""
    yield
    if left := ended_loops.left_open():
        pytest.fail(f"an event loop was closed with something of it left: {', '.join(left)}", pytrace=False)


def pytest_runtest_logfinish() -> None:
    """Leave alone what tests keep for the rest of the run, too: tests collect garbage, to see what that makes."""
    global _kept  # noqa: PLW0603 - what is kept is the process's
    if sys.getallocatedblocks() > _kept + _MUCH:
        gc.collect()
        gc.freeze()
        _kept = sys.getallocatedblocks()


def _shares_a_fixture(item: pytest.Item) -> bool:
    """Say whether the module makes something once for its tests: another process would make it again."""
    found = getattr(item, "_fixtureinfo").name2fixturedefs.values()  # noqa: B009 - no public name tells
    return any(definitions[-1].scope == "module" for definitions in found)


@pytest.fixture(scope="session", autouse=True)
def sealed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """With --sealed a key file for the tests' own process, its commands and every Product; without it nothing."""
    if not request.config.getoption("--sealed"):
        yield
        return
    path = tmp_path_factory.mktemp("keys") / "keys"
    encryption.add_key(path)
    encryption.use(path)
    yield
    encryption.use(None)


@pytest.fixture(autouse=True)
def process_wide(sealed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put back what a process decides once for all of itself, keys, bounds, owners, the log: tests share a process."""
    for module, name in (
        (encryption, "_ring"),
        (record, "_most"),
        (ownership, "_trusted"),
        (private_files, "_owner"),
        (log_lines, "_events"),
    ):
        value = getattr(module, name)
        monkeypatch.setattr(module, name, set(value) if isinstance(value, set) else value)


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """The session's Redis. Do not stop it: take ``redis_factory`` for that."""
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def redis_url(redis_server: RedisServer) -> str:
    """The URL of the session's Redis, emptied."""
    with redis_server.client() as client:
        client.flushall()
        client.config_set("maxmemory", 0)
        client.config_set("maxmemory-policy", "noeviction")
    return redis_server.url


@pytest.fixture
def redis_client(redis_server: RedisServer, redis_url: str) -> Iterator[redis.Redis]:
    """A synchronous client (bytes) of the session's Redis, emptied."""
    with redis_server.client() as client:
        yield client


@pytest.fixture(scope="session")
def clock_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library behind SettableClock; the test is skipped where it cannot be had."""
    try:
        return settable_clock.compile_into(tmp_path_factory.mktemp("clock"))
    except preloaded.NotThere as error:
        pytest.skip(f"no clock that can be set: {error}")


@pytest.fixture
def clock(clock_library: Path, tmp_path: Path) -> SettableClock:
    """A clock for whatever is started with its environment; right until the test sets it."""
    return SettableClock(clock_library, tmp_path / "clock")


@pytest.fixture
def redis_factory(tmp_path: Path) -> Iterator[Callable[..., RedisServer]]:
    """Call it for a started Redis of the test's own, to stop, kill, pause and restart; options spoil its settings."""
    servers: list[RedisServer] = []

    def make(clock: SettableClock | None = None, **options: str) -> RedisServer:
        directory = tmp_path / f"redis-{len(servers)}"
        servers.append(RedisServer(directory, clock, **options))
        return servers[-1].start()

    yield make
    for server in servers:
        server.stop()


@pytest.fixture
def scripted() -> Iterator[Callable[..., ScriptedServer]]:
    """Call it for a started ScriptedServer; its arguments are the server's. All end with the test."""
    servers: list[ScriptedServer] = []

    def make(*args: Any, **options: Any) -> ScriptedServer:
        servers.append(ScriptedServer(*args, **options))
        return servers[-1].start()

    yield make
    with ExitStack() as ends:
        for server in servers:
            ends.callback(server.stop)


@pytest.fixture
def dns_server() -> Iterator[Callable[..., DnsServer]]:
    """Call it with records for a started DnsServer. All end with the test."""
    servers: list[DnsServer] = []

    def make(*records: str) -> DnsServer:
        servers.append(DnsServer(*records).start())
        return servers[-1]

    yield make
    for server in servers:
        server.stop()


@pytest.fixture
def primary(scripted: Callable[..., ScriptedServer]) -> ScriptedServer:
    """A server that accepts everything, to stand for the primary; script it with ``primary.replies``."""
    return scripted()


@pytest.fixture
def backup(scripted: Callable[..., ScriptedServer]) -> ScriptedServer:
    """A server that accepts everything, to stand for a backup; script it with ``backup.replies``."""
    return scripted()


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    """A certificate for localhost."""
    return Certificate(tmp_path_factory.mktemp("certificate"))


@pytest.fixture
def postfix() -> Iterator[Callable[[PostfixInstance], PostfixInstance]]:
    """Start an instance and remove it at the end: ``store = postfix(PostfixInstance.store())``.

    Skips where Postfix cannot run; tests that use it carry ``@pytest.mark.postfix``.
    """
    if reason := postfix_instance.unavailable():
        pytest.skip(reason)
    with ExitStack() as ends:

        def start(instance: PostfixInstance) -> PostfixInstance:
            ends.callback(instance.remove)
            return instance.start()

        yield start


@pytest.fixture
def smtp_sink() -> Iterator[Callable[..., SmtpSink]]:
    """Call it for a started smtp-sink; its arguments are the sink's. Skips where there is none."""
    if reason := load.unavailable():
        pytest.skip(reason)
    with ExitStack() as ends:

        def start(*options: str, **more: Any) -> SmtpSink:
            sink = SmtpSink(*options, **more)
            ends.callback(sink.remove)
            return sink.start()

        yield start


@pytest.fixture
def product(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., Product]]:
    """Call it for a Product that is ready: ``product(primary=primary.address, backups=[backup.address])``.

    ``start=False`` leaves starting to the test. Several in one test get folders of their own. What a test module has
    as WAITS is for all of its products.
    """
    made: list[Product] = []
    waits = getattr(request.module, "WAITS", {})

    def make(*, start: bool = True, **options: Any) -> Product:
        options["waits"] = {**waits, **options.get("waits", {})}
        made.append(Product(tmp_path / f"product-{len(made)}", **options))
        return made[-1].start() if start else made[-1]

    yield make
    for instance in made:
        instance.clean_up()


@pytest.fixture(scope="session")
def exim_program() -> Iterator[Path]:
    """Exim, where it can be had."""
    # Not below pytest's folder: its daemons must be able to enter.
    with tempfile.TemporaryDirectory(prefix="smtp-dup-exim-") as folder:
        program, reason = exim_instance.unpack(Path(folder))
        if program is None:
            pytest.skip(reason)
        yield program


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Call it for an empty disk of so many megabytes."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    with ExitStack() as ends:

        def mount(megabytes: int, inodes: int = 0) -> Path:
            disk = tmp_path / "disk"
            disk.mkdir()
            command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m,nr_inodes={inodes}", "tmpfs", str(disk)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
            ends.callback(subprocess.run, ["umount", "-l", str(disk)], check=True)
            return disk

        yield mount
