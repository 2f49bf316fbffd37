"""What is measured: smtp-dup as `up` runs by default, and what does the same or part of it.

Every peer listens on loopback and has targets of its own (smtp-sink, which counts), so that a late copy of one is not
counted for another. All are started through an ExitStack and end with it.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import redis

from bench import ROOT, exim, haraka, programs, usage
from relay.ledger import keys
from relay.redisio import embedded
from support import postfix_instance
from support.child_processes import tied
from support.load import SmtpSink
from support.postfix_instance import PostfixInstance
from support.product import Product
from support.redis_servers import RedisServer
from support.waiting import free_port, wait_until

# `up` as an operator has it: the harness's own choices undone.
_AS_SHIPPED = {
    "smtp.processes": "0",
    "log.level": "info",
    "log.format": "text",
    "spool.min_free": "1G",
    "ready.check_every": "",
}


@dataclass(slots=True)
class Peer:
    """Something that takes mail on a port; its targets are the primary first, then the backups."""

    name: str
    port: int
    targets: tuple[SmtpSink, ...]
    pending: Callable[[], int] = lambda: 0  # copies that it knows it still owes
    faults: Callable[[], list[str]] = list  # what should be empty and is not
    product: Product | None = None
    processes: Callable[[], dict[str, list[int]]] = dict  # by what they do

    @property
    def target_names(self) -> tuple[str, ...]:
        return ("primary", *(f"backup {n}" if len(self.targets) > 2 else "backup" for n in range(1, len(self.targets))))

    def arrived(self) -> tuple[int, ...]:
        """Return how many messages each target has taken."""
        return tuple(target.count for target in self.targets)


def sink(stack: ExitStack, *options: str) -> SmtpSink:
    return stack.enter_context(SmtpSink(*options))


def smtp_dup(
    stack: ExitStack,
    folder: Path,
    *,
    backups: int = 1,
    addresses: Iterable[str] = (),
    settings: Mapping[str, str] | None = None,
    name: str = "smtp-dup",
    start: bool = True,
    source: Path = ROOT,
) -> Peer:
    """Make `smtp-dup up` with default settings, one sink as primary and one for each backup.

    ``addresses`` replace those of the backups: something stands in between. ``source`` is the tree that is run.
    """
    targets = tuple(sink(stack) for _ in range(1 + backups))
    names = list(addresses) or [target.address for target in targets[1:]]
    product = Product(
        folder / name.replace(" ", "-"),
        primary=targets[0].address,
        backups=names,
        settings={**_AS_SHIPPED, **(settings or {})},
        source=source,
    )
    stack.callback(product.clean_up)
    client = redis.Redis.from_url(product.redis_url)
    stack.callback(client.close)
    if start:
        product.start()
    return Peer(
        name,
        product.smtp_port,
        targets,
        pending=lambda: _pending(client, names),
        faults=lambda: _faults(client, product, names),
        product=product,
        processes=lambda: usage.kinds(product),
    )


def _pending(client: redis.Redis, names: list[str]) -> int:
    with client.pipeline(transaction=False) as pipe:
        for name in names:
            pipe.zcard(keys.PENDING + name)
        return sum(pipe.execute())


def _faults(client: redis.Redis, product: Product, names: list[str]) -> list[str]:
    with client.pipeline(transaction=False) as pipe:
        pipe.zcard(keys.STAGED)
        pipe.zcard(keys.UNCERTAIN)
        for name in names:
            pipe.zcard(keys.FAILED + name)
        staged, uncertain, *failed = pipe.execute()
    found = {
        "staged": staged,
        "uncertain": uncertain,
        "failed": sum(failed),
        "lost": int(product.metric("smtpdup_copies_lost_total")),
    }
    return [f"{count} copies are {state}" for state, count in found.items() if count]


def postfix_bcc(stack: ExitStack) -> Peer:
    """Make Postfix with a bcc map: the same job, by the usual means."""
    primary, backup = sink(stack), sink(stack)
    instance = stack.enter_context(PostfixInstance.bcc(primary.port, backup.port))
    return Peer("Postfix with a copy", instance.port, (primary, backup), processes=_tree(str(instance.directory)))


def postfix_alone(stack: ExitStack) -> Peer:
    """Make Postfix that sends to the primary only."""
    primary = sink(stack)
    instance = stack.enter_context(PostfixInstance.front(primary.port))
    return Peer("Postfix without a copy", instance.port, (primary,), processes=_tree(str(instance.directory)))


def _tree(mark: str) -> Callable[[], dict[str, list[int]]]:
    return lambda: {"all": usage.tree(mark)}


def plain_relay(stack: ExitStack, *, keep: bool) -> Peer:
    """Make the relay of some fifty lines that promises nothing."""
    primary, backup = sink(stack), sink(stack)
    port = free_port()
    words = [str(port), str(primary.port), str(backup.port), *(["--keep"] if keep else [])]
    process = programs.start(stack, "plain_relay", *words, port=port)
    name = "plain relay, pooled" if keep else "plain relay"
    return Peer(name, port, (primary, backup), processes=lambda: {"all": [process.pid]})


def direct(stack: ExitStack) -> Peer:
    """Make no relay at all: what the load and a target can do on this machine."""
    primary = sink(stack)
    return Peer("straight to the sink", primary.port, (primary,))


def exim_unseen(stack: ExitStack, folder: Path) -> Peer:
    """Make Exim with an ``unseen`` router for the copy."""
    primary, backup = sink(stack), sink(stack)
    port = exim.start(stack, folder / "exim", primary.port, backup.port)
    # Its deliveries detach themselves, so that their processor time cannot be summed up.
    return Peer("Exim with a copy", port, (primary, backup))


def haraka_copy(stack: ExitStack, folder: Path) -> Peer:
    """Make Haraka with a plugin for the copy."""
    primary, backup = sink(stack), sink(stack)
    port, pid = haraka.start(stack, folder / "haraka", primary.port, backup.port)
    return Peer(
        "Haraka with a copy", port, (primary, backup), processes=lambda: {"all": [pid, *usage.descendants(pid)]}
    )


def limit_unavailable() -> str:
    """Say why the program in C cannot be built; "" when it can."""
    return "" if shutil.which("cc") else "needs a C compiler"


def limit(stack: ExitStack, folder: Path) -> Peer:
    """Make the program in C of the same design, with a Redis that is run as the product's: what is left to gain."""
    primary, backup = sink(stack), sink(stack)
    folder.mkdir()
    program = folder / "limit"
    subprocess.run(["cc", "-O2", "-o", str(program), str(ROOT / "bench" / "limit.c")], check=True, timeout=60)
    server = RedisServer(folder).start()
    stack.callback(server.stop)
    client = server.client()
    stack.callback(client.close)
    port = free_port()
    path = str(embedded.socket_path(folder))
    words = [str(program), str(port), str(primary.port), str(backup.port), path]
    process = subprocess.Popen(tied(words), stdin=subprocess.DEVNULL, start_new_session=True)
    stack.callback(programs.stop, process)
    wait_until(lambda: programs.listens(process, port), message="bench/limit.c does not listen")
    assert server.process is not None
    pids = [process.pid, *usage.descendants(process.pid), server.process.pid]
    return Peer(
        "the same in C",
        port,
        (primary, backup),
        pending=lambda: int(client.zcard("limit:pending")),
        processes=lambda: {"all": pids},
    )


def competitors(stack: ExitStack, folder: Path, wanted: tuple[str, ...] = ()) -> list[Peer]:
    """Start every peer that can be run here, smtp-dup first. ``wanted`` are beginnings of their short names."""
    makers: dict[str, tuple[bool, Callable[[], Peer]]] = {
        "smtp-dup": (True, lambda: smtp_dup(stack, folder)),
        "postfix": (not postfix_instance.unavailable(), lambda: postfix_bcc(stack)),
        "postfix-alone": (not postfix_instance.unavailable(), lambda: postfix_alone(stack)),
        "exim": (exim.program() is not None, lambda: exim_unseen(stack, folder)),
        "haraka": (haraka.program() is not None, lambda: haraka_copy(stack, folder)),
        "plain": (True, lambda: plain_relay(stack, keep=False)),
        "plain-pooled": (True, lambda: plain_relay(stack, keep=True)),
        "limit": (not limit_unavailable(), lambda: limit(stack, folder / "limit")),
        "direct": (True, lambda: direct(stack)),
    }
    return [make() for name, (there, make) in makers.items() if there and (not wanted or name in wanted)]


NAMES = ("smtp-dup", "postfix", "postfix-alone", "exim", "haraka", "plain", "plain-pooled", "limit", "direct")


def enough_disk(folder: Path) -> str:
    """Say why the folder is no place for a benchmark; "" when it is."""
    return "" if shutil.disk_usage(folder).free > 4 << 30 else f"less than 4 GB are free at {folder}"
