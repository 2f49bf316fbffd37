"""The display of `smtp-dup demo`: it sends some messages as a client would and shows where each one went.

A table that changes in place on a terminal, a line for each thing that happens elsewhere. It ends when all has
been seen, and the demo goes on without it; what is not there in time ends the whole demo with an error.
"""

from __future__ import annotations

import json
import signal
import smtplib
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from email.message import EmailMessage
from email.policy import SMTP
from typing import Any

from loguru import logger
from redis import Redis
from redis.exceptions import RedisError
from rich.console import Console
from rich.live import Live
from rich.table import Table

from relay import ledger
from relay.demo_stage import Stage, command_line

_PATIENCE = 60.0  # seconds until all must have been shown
_SENDER = "sender@example.org"
_BACKUP = "new"


@dataclass(slots=True)
class Sample:
    """One message, and what is known of it so far."""

    title: str
    recipients: tuple[str, ...]
    text: str = "This is a demonstration.\n"
    attachment: bytes = b""
    heard: str = ""
    old: str = ""
    new: list[str] = field(default_factory=list)
    copy: str = ""
    id: str = ""

    @property
    def is_settled(self) -> bool:
        return self.copy in {"none", "delivered", "failed list"}

    def message(self) -> EmailMessage:
        """Return it as a mail client would make it."""
        message = EmailMessage()
        message["From"] = f"A sender <{_SENDER}>"
        message["To"] = ", ".join(self.recipients)
        message["Subject"] = self.title
        message.set_content(self.text)
        if self.attachment:
            message.add_attachment(self.attachment, maintype="application", subtype="octet-stream", filename="data.bin")
        return message


def samples() -> list[Sample]:
    """Return the programme; how the servers treat each recipient is in demo_servers."""
    return [
        Sample("A plain message", ("alice@example.com",)),
        Sample("Grüße, and a file", ("bob@example.com",), "Schöne Grüße\n", bytes(range(256)) * 100),
        Sample("Old refuses it", ("nobody@example.com",)),
        Sample("Old refuses one of two", ("carol@example.com", "gone@example.com")),
        Sample("New defers it once", ("dave@example.com",)),
        Sample("New refuses it", ("erin@example.com",)),
    ]


def show(stage: Stage) -> int:
    """Send, show, say what to try next; the ``run`` of a supervisor's child. Returns the exit status."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # leave the terminal as it was
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # we are not the terminal's foreground process group
    console = Console(highlight=False)
    with Redis.from_url(stage.redis_url, socket_timeout=5) as redis, _view(console, samples()) as (programme, changed):
        done = _play(stage, programme, changed, redis)
    if not done:
        console.print("Not everything was seen in time; the demo ends.")
        return 1
    _say_what_next(console, stage, programme)
    return 0


def _play(stage: Stage, programme: list[Sample], changed: Any, redis: Redis) -> bool:
    deadline = time.monotonic() + _PATIENCE
    client = _client(stage, deadline)
    if client is None:
        return False
    with client:
        for sample in programme:
            sample.heard = _send(client, sample)
            _look(stage, programme, redis)
            changed()
    while not all(sample.is_settled for sample in programme):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
        _look(stage, programme, redis)
        changed()
    return True


def _client(stage: Stage, deadline: float) -> smtplib.SMTP | None:
    while time.monotonic() < deadline:
        with suppress(OSError, smtplib.SMTPException):
            return smtplib.SMTP(*stage.smtp, local_hostname="client.example.org", timeout=30)
        time.sleep(0.05)
    return None


def _send(client: smtplib.SMTP, sample: Sample) -> str:
    """Send one message; return what the client heard that matters."""
    content = sample.message().as_bytes(policy=SMTP)
    client.ehlo_or_helo_if_needed()
    size = [f"size={len(content)}"] if client.has_extn("size") else []
    code, text = client.mail(_SENDER, size)
    refusals = []
    if code == 250:
        for address in sample.recipients:
            code, text = client.rcpt(address)
            if code != 250:
                refusals.append(f"{address.partition('@')[0]}: {_reply(code, text)}")
        if len(refusals) < len(sample.recipients):
            code, text = client.data(content)
    if code != 250 or len(refusals) == len(sample.recipients):
        client.rset()
        sample.copy = "none"
    return "; ".join([*refusals, *([] if len(refusals) == len(sample.recipients) else [_reply(code, text)])])


def _reply(code: int, text: bytes) -> str:
    return f"{code} {text.decode('utf-8', 'replace').splitlines()[0] if text else ''}".rstrip()


# What became of it ---------------------------------------------------------------------------------------------


def _look(stage: Stage, programme: list[Sample], redis: Redis) -> None:
    """Bring the programme up to date with what the servers did and what the ledger says."""
    for sample in programme:
        sample.old, sample.new = "", []
    for seen in _seen(stage):
        sample = next(s for s in programme if set(seen["recipients"]) & set(s.recipients))
        if seen["server"] == _BACKUP:
            sample.new.append(seen["reply"])
        elif seen["id"] or not sample.old:  # what it said of the message, rather than of one recipient
            sample.old = seen["reply"]
            sample.id = seen["id"] or sample.id
    for sample in programme:
        if sample.heard and sample.id and not sample.is_settled:
            try:
                sample.copy = _state(redis, sample)
            except RedisError as error:
                logger.warning("display: {}", error)


def _seen(stage: Stage) -> Iterator[dict[str, Any]]:
    """Yield what the servers did, oldest first."""
    for line in stage.seen.read_text("utf-8").splitlines() if stage.seen.exists() else []:
        with suppress(ValueError):  # it is being written
            yield json.loads(line)


def _state(redis: Redis, sample: Sample) -> str:
    with redis.pipeline(transaction=False) as pipe:
        pipe.zscore(ledger.STAGED, sample.id)
        pipe.zscore(ledger.PENDING + _BACKUP, sample.id)
        pipe.zscore(ledger.FAILED + _BACKUP, sample.id)
        staged, pending, failed = pipe.execute()
    if failed is not None:
        return "failed list"
    if staged is not None or pending is not None:
        return "waits for another try" if sample.new else "waits"
    return "delivered" if any(reply.startswith("2") for reply in sample.new) else "waits"


# The view ------------------------------------------------------------------------------------------------------


@contextmanager
def _view(console: Console, programme: list[Sample]) -> Iterator[tuple[list[Sample], Any]]:
    """Give the programme and what to call when it has changed."""
    if console.is_terminal:
        with Live(_table(programme), console=console, refresh_per_second=10) as live:
            yield programme, lambda: live.update(_table(programme))
        return
    told: list[dict[str, str]] = [{} for _ in programme]

    def tell() -> None:
        for sample, known in zip(programme, told, strict=True):
            now = {
                "client heard": sample.heard,
                "old": sample.old,
                "new": " / ".join(sample.new),
                "copy": sample.copy,
            }
            for what, text in now.items():
                if text and known.get(what) != text:
                    sys.stdout.write(f"{sample.title}: {what}: {text}\n")
            known.update(now)
        sys.stdout.flush()

    yield programme, tell


def _table(programme: list[Sample]) -> Table:
    table = Table(expand=False)
    for title in ("Message", "The client hears", "Old (primary) said", "New (backup) said", "Its copy"):
        table.add_column(title, overflow="fold")
    for sample in programme:
        colour = {"delivered": "green", "failed list": "red", "none": "dim"}.get(sample.copy, "yellow")
        table.add_row(
            sample.title,
            _coloured(sample.heard),
            _coloured(sample.old),
            "\n".join(_coloured(reply) for reply in sample.new),
            f"[{colour}]{'no copy' if sample.copy == 'none' else sample.copy}[/]",
        )
    return table


def _coloured(reply: str) -> str:
    colours = {"2": "green", "4": "yellow", "5": "red"}
    return f"[{colours.get(reply[0], 'red')}]{reply}[/]" if reply else ""


def _say_what_next(console: Console, stage: Stage, programme: list[Sample]) -> None:
    failed = next((sample.id for sample in programme if sample.copy == "failed list"), "ID")
    host, port = stage.smtp
    another = (
        f"python3 -c \"import smtplib; smtplib.SMTP('{host}', {port}).sendmail("
        "'me@example.org', 'frank@example.com', 'Subject: another\\n\\nHello')\""
    )
    rows = (
        ("Send another message", another),
        ("What waits", command_line(stage, "queue summary")),
        ("What failed", command_line(stage, "failed list")),
        ("One of them", command_line(stage, f"failed show {failed}")),
        ("Try it again", command_line(stage, f"failed retry {failed}")),
        ("The message itself", command_line(stage, f"failed export {failed}")),
        ("Numbers", f"curl -s {stage.status}/metrics | grep ^smtpdup"),
        ("The log", f"tail -f {stage.log}"),
    )
    console.print(f"\nAll of it keeps running: the relay on {host}:{port}. In another terminal, try:\n")
    for what, line in rows:
        # As one line, however long: it is for copy and paste.
        console.print(f"  # {what}", style="dim", markup=False)
        console.print(f"  {line}", markup=False, soft_wrap=True)
    console.print("\nCtrl-C ends the demo.")
    sys.stdout.flush()
