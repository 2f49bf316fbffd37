"""`probe`: whether the recipients of the mail exist at a server, before anything depends on it."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from redis import Redis

from relay.cockpit import formatting, hold_and_throttle, probe_sources, probing
from relay.cockpit.formatting import count
from relay.cockpit.mailbox_probe import Exists, MailboxProbe, Manner, Probed
from relay.cockpit.moves import Answering
from relay.cockpit.probe_results import ProbeResults
from relay.cockpit.probe_sources import NoAddresses, Recipients
from relay.cockpit.roles_now import UnknownRoute, on_route
from relay.command import address_file
from relay.command.command_line import tell
from relay.command.connection import ledger_of
from relay.command.exit_status import CANNOT_SAY, INTERRUPTED, NO, WELL, CannotSay, Misuse, read_flag
from relay.command.long_runs import slow_progress
from relay.command.output import GREEN, RED, YELLOW, Column, Output
from relay.config.loader import Settings
from relay.config.types import duration
from relay.ledger import changes
from relay.ledger.probe_evidence import REFUSALS, SEEN, ProbeEvidence
from relay.mail.destination import Destination
from relay.mail.text import printable
from relay.routing.table_file import BadTable
from relay.smtpd.recipients import typed_path
from relay.smtpd.syntax import SyntaxProblem

_STEP_SECONDS = 30.0  # for the reply to one command, at most: some servers wait before they refuse
_PAUSES = (60.0, 300.0)  # before those that were put off are asked again: greylisting wants some minutes
_MOST_ALIKE = 20
_SHOW_SECONDS = 0.3  # between two updates of the progress
_FAULTS = 20  # lines that are shown
_STATUS = {probing.ALL_WELL: WELL, probing.SOME_NOT: NO, probing.CANNOT_TELL: CANNOT_SAY}
_COLOURS = {Exists.YES: GREEN, Exists.NO: RED, Exists.REFUSED: RED}
_ANSWERS = [
    Column("result", lambda one: one.result.value, colour=lambda one: _COLOURS.get(one.result, YELLOW)),
    Column("address", lambda one: one.address),
    Column("reply", lambda one: one.text, detail=True),
]


def probe(
    settings: Settings,
    out: Output,
    name: str,
    recipients: str | None,
    seen: str | None,
    refused: bool,
    route: str,
    rate: str,
    per_connection: int,
    sender: str | None,
    fresh: bool,
    as_csv: bool,
) -> int:
    """Ask a server about recipients. Says no where some do not exist there, or exist that should not."""
    if (recipients is not None) + (seen is not None) + refused != 1:
        raise Misuse("whom? smtp-dup probe NAME --recipients FILE, or --seen 30d, or --refused: one of them")
    if as_csv and out.as_json:
        raise Misuse("--csv or --json, not both")
    server = _server(settings, name)
    path = _sender(settings, sender)
    interval = 1 / read_flag("--rate", hold_and_throttle.rate, rate)
    manner = Manner(path, per_connection, interval, _STEP_SECONDS, _PAUSES, _MOST_ALIKE, wants_refusals=refused)
    asked = _of_file(settings, recipients) if recipients is not None else None
    age = read_flag("--seen", duration().read, seen) if seen is not None else None
    with ledger_of(settings) as connection:
        if asked is None:
            asked = _of_trace(settings, connection, server.name, age)
        if route:
            _limit(connection, settings, asked, server.name, route)
    for note in asked.notes:
        tell(note)
    if not asked.addresses and not refused:
        raise Misuse(f"nobody is asked about: no mail of these takes {route}")
    return _Run(settings, out, server, asked, route, manner, as_csv=as_csv).run(anew=fresh)


def _of_file(settings: Settings, file: str) -> Recipients:
    """Read a file; nobody is asked where a line is wrong: whoever is left out by mistake would be missed later."""
    asked = probe_sources.of_file(address_file.read(file), file, fold=settings.routes.fold_local)
    if asked.faults:
        for fault in asked.faults[:_FAULTS]:
            tell(f"{file}: {fault}")
        more = f", {rest} more than shown" if (rest := len(asked.faults) - _FAULTS) > 0 else ""
        raise Misuse(f"nobody was asked: {count(len(asked.faults), 'line is', 'lines are')} wrong{more}")
    if not asked.addresses:
        raise Misuse(f"{file}: no address is in it")
    return asked


def _of_trace(settings: Settings, connection: Redis, name: str, age: float | None) -> Recipients:
    """Read the trace: those whom the primary has taken within that age, or (None) those whom it has refused."""
    what, since = (REFUSALS, 0.0) if age is None else (SEEN, time.time() - age)
    try:
        with slow_progress("reading the trace") as progress:
            return probe_sources.of_trace(settings, connection, name, what, since, progress)
    except NoAddresses as error:
        raise CannotSay(str(error)) from error
    except (BadTable, OSError) as error:
        raise CannotSay(f"a table of routes, or the trace, cannot be read: {error}") from error


def _server(settings: Settings, name: str) -> Destination:
    named = {one.name.lower(): one for one in settings.named}
    if name.lower() not in named:
        there = ", ".join(one.name for one in settings.named) or "none"
        raise Misuse(f"these settings have no server named {printable(name)}; they name: {there}")
    return named[name.lower()]


def _sender(settings: Settings, sender: str | None) -> str:
    if sender is None:
        return f"postmaster@{settings.smtp.domain}"
    try:
        return typed_path(sender, "FROM")
    except SyntaxProblem:
        raise Misuse(f"--sender: expected an address, or <> for the null sender, not {printable(sender)}") from None


def _limit(connection: Redis, settings: Settings, asked: Recipients, name: str, route: str) -> None:
    """Leave out those whose mail takes another route than this one, which the server must be of."""
    try:
        first, others, _ = on_route(connection, settings, route)
        if name not in {first, *others}:
            raise Misuse(f"{name} is no server of {route}; {', '.join((first, *others))} are")
        probe_sources.on_route(asked, Answering(connection, settings), route)
    except UnknownRoute as error:
        raise Misuse(str(error)) from error
    except (BadTable, OSError) as error:
        raise CannotSay(f"a table of routes cannot be read: {error}") from error


class _Run:
    """One probe, from the first answer to what it comes to."""

    def __init__(
        self,
        settings: Settings,
        out: Output,
        server: Destination,
        asked: Recipients,
        route: str,
        manner: Manner,
        *,
        as_csv: bool,
    ) -> None:
        self._settings = settings
        self._out = out
        self._server = server
        self._asked = asked
        self._route = route
        self._manner = manner
        self._as_csv = as_csv

    def run(self, *, anew: bool) -> int:
        """Ask those that have not been answered, keep what that comes to, and show it."""
        name = f"{self._server.name}.{self._asked.what}"
        head = {"server": self._server.address, "sender": self._manner.sender}
        try:
            with self._state_folder():
                results = ProbeResults(self._settings.state_dir, name, head, anew=anew)
        except BlockingIOError:
            raise CannotSay(f"another `smtp-dup probe {self._server.name}` is running here") from None
        with results:
            return self._with(results)

    @contextmanager
    def _state_folder(self) -> Iterator[None]:
        try:
            yield
        except BlockingIOError:
            raise
        except OSError as error:
            raise CannotSay(f"the answers cannot be kept in {self._settings.state_dir}: {error.strerror}") from error

    def _with(self, results: ProbeResults) -> int:
        known = [one for one in self._asked.addresses if one in results.found]
        if known and results.since is not None:
            since = formatting.moment(results.since)
            tell(f"going on with {count(len(known), 'answer')} since {since}; --fresh asks about everybody again")
        try:
            trouble = self._ask(results)
        except KeyboardInterrupt:
            found = probing.evidence(self._asked, results.found, "", 0.0)
            tell(f"stopped: {found.left:,} of {found.asked:,} are left, and the same command goes on with them")
            return INTERRUPTED
        try:
            with ledger_of(self._settings) as connection:
                found = probing.evidence(self._asked, results.found, trouble, changes.now(connection))
                probing.keep(connection, self._server.name, self._route, self._asked, found)
        except CannotSay as error:
            raise CannotSay(f"{error}; the answers are kept, and the same command goes on with them") from error
        if not found.left and not found.put_off:
            with self._state_folder():
                results.finish()
        self._show([results.found[one] for one in self._asked.addresses if one in results.found], found)
        return _STATUS[probing.outcome(self._asked.what, found)]

    def _ask(self, results: ProbeResults) -> str:
        """Ask about whoever is left. Returns why it ended early."""
        done = {address for address, one in results.found.items() if one.result is not Exists.PUT_OFF}
        left = [one for one in self._asked.addresses if one not in done]
        answered: set[str] = set()
        with slow_progress(f"asking {self._server.name}") as progress:

            async def show() -> None:  # also while the server says nothing
                while True:
                    await asyncio.sleep(_SHOW_SECONDS)
                    progress(len(answered), len(left))

            def note(answer: Probed) -> None:
                with self._state_folder():
                    results.add(answer)
                answered.add(answer.address)

            async def ask() -> None:
                showing = asyncio.create_task(show())
                try:
                    await asking.ask(left)
                finally:
                    showing.cancel()

            asking = MailboxProbe(self._settings, self._server, self._manner, note, self._pausing)
            asyncio.run(ask())
        return asking.trouble

    def _pausing(self, number: int, seconds: float) -> None:
        tell(f"{count(number, 'recipient was', 'recipients were')} put off: asked again in {formatting.span(seconds)}")

    # What is shown

    def _show(self, answers: Sequence[Probed], found: ProbeEvidence) -> None:
        if self._out.as_json:
            for one in answers:
                self._out.object({
                    "kind": "recipient", "address": one.address, "result": one.result.value,
                    "accepted": one.is_accepted, "reply": one.text,
                })  # fmt: skip
            self._out.object(self._as_object(found))
            return
        if self._as_csv:
            sys.stdout.writelines(f"{line}\n" for line in probing.csv_lines(answers))
            tell(", ".join(f"{word} {number:,}" for word, number in probing.numbers(found) if number))
        else:
            worth = [one for one in answers if self._is_worth_a_line(one)]
            if worth:
                self._out.rows(worth, _ANSWERS, nothing="")
                self._out.line("")
            self._out.pairs(self._pairs(found))
        if found.why:
            tell(f"{found.why}; it has stopped, and the same command goes on from here")

    def _is_worth_a_line(self, one: Probed) -> bool:
        if self._asked.what == REFUSALS:
            return one.is_accepted
        return one.result not in {Exists.YES, Exists.UNTOLD}

    def _pairs(self, found: ProbeEvidence) -> list[tuple[str, str]]:
        about = count(found.asked, "recipient")
        route = f" of {self._route}" if self._route else ""
        rows = [("asked", f"{self._server.name} about {about}{route} ({self._asked.source})")]
        rows += [(word, f"{number:,}") for word, number in probing.numbers(found) if number]
        if found.open_domains:
            domains = f"in {found.open_domains:,} of {count(found.domains, 'domain')}"
            rows.append(("note", f"{self._server.name} accepts anything {domains}, or refuses only after DATA"))
        return rows

    def _as_object(self, found: ProbeEvidence) -> dict[str, object]:
        return {
            "kind": "summary",
            "destination": self._server.name,
            "what": self._asked.what,
            "route": self._route,
            "source": self._asked.source,
            "at": found.at,
            "asked": found.asked,
            "exist": found.exist,
            "missing": found.missing,
            "refused": found.refused,
            "put_off": found.put_off,
            "untold": found.untold,
            "left": found.left,
            "accepted": found.accepted,
            "domains": found.domains,
            "open_domains": found.open_domains,
            "why": found.why,
        }
