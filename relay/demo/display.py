"""The display of `smtp-dup demo`: it sends some messages as a client would and shows where each one went.

On a terminal it is a table that is updated in place and fits the screen; elsewhere a line for each event. When all
messages have been shown it suggests commands, goes on sending one now and then, and shows other mail that arrives, too.
If one of the first messages is not seen in time, the whole demo ends with an error.
"""

from __future__ import annotations

import json
import signal
import smtplib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from email.policy import SMTP
from typing import Any

from loguru import logger
from redis import Redis
from redis.exceptions import RedisError
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from relay.demo.samples import SENDER, Sample, samples
from relay.demo.setup import DemoSetup, command_line
from relay.demo.traffic import EVERY, Traffic
from relay.ledger import keys

_PATIENCE = 60.0  # seconds within which all messages must have been shown
_PRIMARY = "old"
_BACKUP = "new"
_FOLLOW_SECONDS = 0.3
_MOST_ROWS = 30
_ABOUT_ROUTES = (
    ("Every route", "route list"),
    ("Which one anna takes, and why", "route anna@shop.example"),
    ("A quarter of the shop's mailboxes for the new server", "route weight shop shop=3 new=1 --yes"),
    ("The new server answers for bob", "move bob@example.com --to new --yes"),
)
_TITLES = ("Client hears", "Old server", "New server", "Its copy")
_WITH_ROUTES = ("Client hears", "Old server, or shop", "New server", "Its copy")


def show(stage: DemoSetup) -> int:
    """Send and show the messages, suggest commands, show further mail; the ``run`` of a supervisor's child.

    Returns the exit status.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # we are not the terminal's foreground process group
    console = coloured_console(stage.colour)
    try:
        with Redis.from_url(stage.redis_url, socket_timeout=5) as redis:
            return _show(stage, console, redis)
    finally:
        if console.is_terminal:
            console.show_cursor()  # SIGTERM may have come just after a Live had hidden it


def _show(stage: DemoSetup, console: Console, redis: Redis) -> int:
    programme = samples(routes=stage.has_routes)
    view = DemoView(console, programme, _WITH_ROUTES if stage.has_routes else _TITLES)
    watch = Watch(stage, programme, redis)
    with view.shown(transient=True) as changed:
        done = _play(stage, programme, changed, watch)
    if not done:
        if console.is_terminal:
            console.print(view.table())
        console.print("Not everything was seen in time; the demo ends.")
        return 1
    _say_what_next(console, stage, programme)
    # Below the suggestions, so that it is on the screen however small that is.
    traffic = Traffic(stage.smtp, programme, _send, routes=stage.has_routes)
    with view.shown(transient=False) as changed:
        while True:  # until SIGTERM
            changed()
            time.sleep(_FOLLOW_SECONDS)
            traffic.go_on()
            watch.look()


def _play(stage: DemoSetup, programme: list[Sample], changed: Callable[[], None], watch: Watch) -> bool:
    deadline = time.monotonic() + _PATIENCE
    client = _client(stage, deadline)
    if client is None:
        return False
    with client:
        for sample in tuple(programme):  # to which other mail is added
            sample.heard = _send(client, sample)
            watch.look()
            changed()
    while not all(sample.is_settled for sample in programme):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
        watch.look()
        changed()
    return True


def _client(stage: DemoSetup, deadline: float) -> smtplib.SMTP | None:
    while time.monotonic() < deadline:
        with suppress(OSError, smtplib.SMTPException):
            return smtplib.SMTP(*stage.smtp, local_hostname="client.example.org", timeout=30)
        time.sleep(0.05)
    return None


def _send(client: smtplib.SMTP, sample: Sample) -> str:
    """Send one message; returns the refusals, or else the reply to the message."""
    content = sample.message().as_bytes(policy=SMTP)
    client.ehlo_or_helo_if_needed()
    size = [f"size={len(content)}"] if client.has_extn("size") else []
    code, text = client.mail(SENDER, size)
    refusals = []
    if code == 250:
        for address in sample.recipients:
            code, text = client.rcpt(address)
            if code != 250:
                refusals.append(f"for {address.partition('@')[0]}: {_reply(code, text)}")
        if len(refusals) < len(sample.recipients):
            code, text = client.data(content)
    if code != 250 or len(refusals) == len(sample.recipients):
        client.rset()
        sample.copy = "none"
    return "; ".join([*refusals, *([] if len(refusals) == len(sample.recipients) else [_reply(code, text)])])


def _reply(code: int, text: bytes) -> str:
    return f"{code} {text.decode('utf-8', 'replace').splitlines()[0] if text else ''}".rstrip()


# What became of it ---------------------------------------------------------------------------------------------


class Watch:
    """Updates the messages from the servers' records and the ledger; adds other mail that arrives."""

    def __init__(self, stage: DemoSetup, programme: list[Sample], redis: Redis) -> None:
        self._seen = stage.seen
        self._programme = programme
        self._redis = redis
        self._read = 0

    def look(self) -> None:
        """Read what has happened since the last call."""
        for seen in self._news():
            self._note(seen)
        for sample in self._programme:
            if sample.heard and sample.id and not sample.is_settled:
                try:
                    sample.copy = _state(self._redis, sample)
                except RedisError as error:
                    logger.warning("display: {}", error)
        while len(self._programme) > _MOST_ROWS and self._programme[0].is_settled:
            del self._programme[0]

    def _news(self) -> Iterator[dict[str, Any]]:
        """Yield the new records of the servers, oldest first."""
        if not self._seen.exists():
            return
        with self._seen.open("rb") as file:
            file.seek(self._read)
            for line in file:
                if not line.endswith(b"\n"):  # it is being written
                    return
                self._read += len(line)
                yield json.loads(line)

    def _note(self, seen: dict[str, Any]) -> None:
        sample = self._find(seen)
        if seen["server"] == _BACKUP:
            sample.new.append(seen["reply"])
        elif seen["id"] or not sample.old:  # what it said of the message, rather than of one recipient
            sample.old, sample.answers = seen["reply"], seen["server"]
            sample.id = seen["id"] or sample.id

    def _find(self, seen: dict[str, Any]) -> Sample:
        """Return the message of a record; a new one if it is not one of the demo's."""
        recipients = tuple(seen["recipients"])
        for sample in reversed(self._programme):
            if seen["id"] and sample.id == seen["id"]:
                return sample
        for sample in reversed(self._programme):
            # A reply to a later message for the same recipient does not belong to this one.
            known = sample.id if seen["id"] else sample.old
            over = seen["server"] != _BACKUP and sample.is_settled and known
            other = seen["subject"] and seen["subject"] != sample.title
            if set(recipients) & set(sample.recipients) and not (over or other or (seen["id"] and sample.id)):
                return sample
        # The primary's reply is what its client hears; a message without an id is a refusal of this recipient.
        sample = Sample(seen["subject"][:40] or f"to {recipients[0]}"[:40], recipients, heard=seen["reply"])
        sample.copy = "" if seen["id"] else "none"
        self._programme.append(sample)
        return sample


def _state(redis: Redis, sample: Sample) -> str:
    with redis.pipeline(transaction=False) as pipe:
        pipe.zscore(keys.STAGED, sample.id)
        pipe.zscore(keys.PENDING + _BACKUP, sample.id)
        pipe.zscore(keys.FAILED + _BACKUP, sample.id)
        staged, pending, failed = pipe.execute()
    is_taken = any(reply.startswith("2") for reply in sample.new)  # which the ledger may not know yet
    if failed is not None:
        return "failed list"
    if staged is not None or pending is not None:
        return "waits" if is_taken or not sample.new else "waits for another try"
    return "delivered" if is_taken else "waits"


# The view ------------------------------------------------------------------------------------------------------


class DemoView:
    """Shows the messages as a table, or line by line."""

    def __init__(self, console: Console, programme: list[Sample], titles: Sequence[str] = _TITLES) -> None:
        self._titles = titles
        self._console = console
        self._programme = programme
        self._told: dict[int, dict[str, str]] = {}

    @contextmanager
    def shown(self, *, transient: bool) -> Iterator[Callable[[], None]]:
        """Yield the function to call after each change. ``transient``: the table is removed at the end."""
        if not self._console.is_terminal:
            yield self._tell
            return
        with Live(self.table(), console=self._console, auto_refresh=False, transient=transient) as live:
            yield lambda: live.update(self.table(), refresh=True)

    def table(self) -> Table:
        """Return the table of the newest messages that the screen has room for."""
        for first in range(len(self._programme) - 1):
            table = _table(self._programme[first:], self._titles)
            if len(self._console.render_lines(table, pad=False)) < self._console.height:
                return table
        return _table(self._programme[-1:], self._titles)

    def _tell(self) -> None:
        for sample in self._programme:
            known = self._told.setdefault(id(sample), {})
            now = {
                "client heard": sample.heard,
                sample.answers: sample.old,
                "new": " / ".join(sample.new),
                "copy": sample.copy,
            }
            for what, text in now.items():
                if text and known.get(what) != text:
                    sys.stdout.write(f"{sample.title}: {what}: {text}\n")
            known.update(now)
        sys.stdout.flush()


def _table(programme: list[Sample], titles: Sequence[str]) -> Table:
    table = Table(expand=False)
    table.add_column("Message", no_wrap=True, overflow="ellipsis", max_width=16)
    for title in titles:
        table.add_column(title, overflow="fold")
    for sample in programme:
        colour = {"delivered": "green", "failed list": "red", "none": "dim"}.get(sample.copy, "yellow")
        table.add_row(
            escape(sample.title),
            "\n".join(_coloured(reply) for reply in sample.heard.split("; ")),
            _coloured(sample.old, sample.answers),
            "\n".join(_coloured(reply) for reply in sample.new),
            f"[{colour}]{'no copy' if sample.copy == 'none' else sample.copy}[/]",
        )
    return table


def coloured_console(colour: str) -> Console:
    """Return the screen, coloured as --color says: always, never, or in a terminal unless NO_COLOR is set."""
    if colour == "auto":
        return Console(highlight=False)
    return Console(highlight=False, color_system="standard" if colour == "always" else None, no_color=False)


def _coloured(reply: str, server: str = _PRIMARY) -> str:
    colours = {"2": "green", "4": "yellow", "5": "red"}
    name = "" if server == _PRIMARY else f"{server}: "
    return f"[{colours.get(reply[0], 'red')}]{escape(name + reply)}[/]" if reply else ""


def _say_what_next(console: Console, stage: DemoSetup, programme: list[Sample]) -> None:
    failed = next((sample.id for sample in programme if sample.copy == "failed list"), "ID")
    host, port = stage.smtp
    another = (
        f"python3 -c \"import smtplib; smtplib.SMTP('{host}', {port}).sendmail("
        "'me@example.org', 'frank@example.com', 'Subject: another\\n\\nHello')\""
    )
    rows = (
        ("Send another message", another),
        ("The page in a browser", command_line(stage, "open")),
        ("Is the new server ready", command_line(stage, "ready new")),
        ("What it answers otherwise", command_line(stage, "divergence")),
        ("Make it the primary", command_line(stage, "promote new --force --reason demo")),
        ("Who answers, and the way back", command_line(stage, "topology")),
        *((what, command_line(stage, words)) for what, words in (_ABOUT_ROUTES if stage.has_routes else ())),
        ("What waits", command_line(stage, "queue summary")),
        ("What failed", command_line(stage, "failed list")),
        ("One of them", command_line(stage, f"failed show {failed}")),
        ("The message itself", command_line(stage, f"failed export {failed}")),
        ("Try it again", command_line(stage, f"failed retry {failed}")),
        ("Numbers", f"curl -s {stage.status}/metrics | grep ^smtpdup"),
        ("The log", f"tail -f {stage.log}"),
    )
    console.print(
        f"\nAll of it keeps running, with a message every {EVERY:.0f} seconds, and this table goes on: the relay is on "
        f"{host}:{port}, the page on {stage.status}. In another terminal:\n"
    )
    for what, line in rows:
        # As one line, however long: it is for copy and paste.
        console.print(f"  # {what}", style="dim", markup=False)
        console.print(f"  {line}", markup=False, soft_wrap=True)
    console.print("\nCtrl-C ends the demo.")
    sys.stdout.flush()
