"""Reload: what runs takes new settings without a restart, whole or not at all.

The supervisor reads file and environment as at the start. With a fault nothing changes. What takes a restart is left as
it is, and named. For all else a further generation of processes is started with the new settings, on the same sockets;
when all are ready the former finish what they have in hand and end. No client is refused meanwhile, no message is lost,
and a transaction ends where it began. When the new ones do not come up, the former go on.

Asked by SIGHUP, where the log is the answer, or by `smtp-dup reload`. Whoever asks while a reload is on its way has
the next one.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any

from relay import log_lines, maillog
from relay.config.differences import Difference, differences
from relay.config.loader import Problem, Settings, SettingsError
from relay.config.model import Layers
from relay.daemon import start
from relay.daemon.child_processes import ChildProcesses
from relay.daemon.control import Question, Tell
from relay.daemon.notify import notify, reloading
from relay.daemon.renewal import SECONDS, Renewal, Roster
from relay.daemon.supervisor import Supervisor
from relay.ledger.audit import Act
from relay.mail import encryption, record
from relay.page import users
from relay.routing import loading
from relay.smtpd.credentials import Credentials
from relay.smtpd.shared_counters import SEATS
from relay.topology import remembered
from relay.topology.roles import decided, disagreement

_QUEUED = 16  # who waits for the reload in progress to end
_SIGNAL = "SIGHUP"
_BEFORE, _AFTER = attrgetter("before"), attrgetter("after")

Read = Callable[[Layers | None], Settings]  # reads all again; what takes a restart as it is in the layers


@dataclass(frozen=True, slots=True)
class Asked:
    """Who asks for a reload, and how they are told; a signal says neither."""

    tell: Tell = field(default=lambda _: None)
    who: str = _SIGNAL
    allow_empty: bool = False  # a table that had keys may have none now


class ReloadRefused(Exception):
    """It cannot be reloaded now; the text is one line."""


@dataclass(slots=True)
class Reload:
    """Reloads one supervisor; ``settings`` are those that run, as they were read."""

    settings: Settings
    read: Read
    processes: ChildProcesses
    supervisor: Supervisor
    roster_for: Callable[[Settings], Roster]
    on_taken: Callable[[Settings, int], None]  # the settings that run now, and their generation
    record: Callable[[Act], None]  # for `smtp-dup audit`; must not raise
    _last: int = 1  # generation that was tried
    _is_under_way: bool = False
    _waiting: deque[Asked] = field(default_factory=deque)

    def hang_up(self) -> None:
        """SIGHUP."""
        self._ask(Asked())

    def answer(self, question: Question, tell: Tell) -> None:
        """Answer a command."""
        if question.get("ask") == "state":
            tell(self._state())
        elif question.get("ask") == "reload" and question.get("dry_run"):
            tell(self._look()[0])
        elif question.get("ask") == "reload":
            self._ask(Asked(tell, str(question.get("who") or _SIGNAL), allow_empty=bool(question.get("allow_empty"))))
        else:
            tell({"refused": "this smtp-dup does not know the question: it has another version"})

    def _ask(self, asked: Asked) -> None:
        if not self._is_under_way:
            self._begin(asked)
        elif len(self._waiting) < _QUEUED:
            self._waiting.append(asked)
        else:
            asked.tell({**self._state(), "refused": "too many reloads wait for the one in progress"})

    # One reload

    def _look(self, *, allow_empty: bool = False) -> tuple[dict[str, Any], Settings | None]:
        """Read the settings. Returns the answer, and what is to be run with, None where nothing changes."""
        try:
            self._check_whether_it_may_be()
            wanted, settings = self._read(allow_empty=allow_empty)
        except SettingsError as error:
            return {**self._state(), "problems": list(map(str, error.problems))}, None
        except ReloadRefused as error:
            return {**self._state(), "refused": str(error)}, None
        except Exception as error:  # who watches over all the others goes on, whatever reading a file may do
            return {**self._state(), "problems": [f"{type(error).__name__}: {error}"]}, None
        changes = differences(self.settings, settings)
        left = [change for change in differences(self.settings, wanted) if change.takes_restart]
        answer = {
            **self._state(),
            "changes": [change._asdict() for change in changes],
            "takes_restart": [change._asdict() for change in left],
        }
        return answer, settings if changes else None

    def _read(self, *, allow_empty: bool) -> tuple[Settings, Settings]:
        """Return what the file and the environment say, and the same with what takes a restart as it is.

        Raises SettingsError with every fault, also of the files that they name.
        """
        wanted = self.read(None)
        settings = self.read(self.settings.layers)
        faults = [fault for look in (self._credentials, self._keys, self._promoted) if (fault := look(settings))]
        if self.processes.role.relays:
            faults += loading.faults(settings, allow_empty=allow_empty)
        if faults:
            raise SettingsError([Problem("", "", text) for text in faults])
        return wanted, settings

    def _credentials(self, settings: Settings) -> str:
        try:
            if self.processes.role.relays:
                Credentials.load(settings.smtp)
            users.check(settings.status)
        except OSError as error:
            return str(error)
        return ""

    @staticmethod
    def _keys(settings: Settings) -> str:
        try:
            if settings.storage.key_file:
                encryption.Keyring(settings.storage.key_file)
        except encryption.BadKeyFile as error:
            return f"storage.key_file: {error}"
        return ""

    def _promoted(self, settings: Settings) -> str:
        """Say where a server that was promoted would not be named any more: another would answer in silence."""
        topology = remembered.load(settings.state_dir) if self.processes.role.relays else None
        if topology is None or decided(self.settings, topology) is None or decided(settings, topology) is not None:
            return ""
        return f"{disagreement(settings, topology)}; name it, or first promote another"

    def _check_whether_it_may_be(self) -> None:
        """See that there is no stop, and room beside those that drain. Raises ReloadRefused."""
        if self.supervisor.is_stopping:
            raise ReloadRefused("it is being stopped")
        crowds = Counter(slot.child.name for slot in self.supervisor.slots)
        if max(crowds.values(), default=0) >= SEATS:
            names = sorted({s.child.name for s in self.supervisor.slots if s.is_leaving})
            raise ReloadRefused(
                f"{SEATS - 1} earlier generations still finish what they have in hand ({', '.join(names)}): "
                "try again when one has ended"
            )

    def _begin(self, asked: Asked) -> None:
        answer, settings = self._look(allow_empty=asked.allow_empty)
        self._log(answer)
        asked.tell({**answer, "begins": settings is not None})
        if settings is None:
            if "changes" in answer:
                maillog.notice("info", "no setting has changed that could be taken")
                self.supervisor.tell_children()  # they read certificate, users and keys again
            return
        self._last += 1
        self._is_under_way = True
        generation, changes = self._last, differences(self.settings, settings)
        reloading()
        try:
            self._prepare(settings)
            fitted = start.fitted(settings, self.processes.role)
            fitted = replace(fitted, redis=fitted.redis.at(self.processes.url))
            children, roster = self.processes.of(fitted, generation), self.roster_for(fitted)
        except Exception as error:  # as above
            self._end(asked, settings, changes, generation, f"{type(error).__name__}: {error}")
            return
        seconds = SECONDS + settings.relay.timeout_seconds  # a relay waits for a primary that is away, too
        self.supervisor.renew(
            Renewal(
                generation, children, roster, lambda why: self._end(asked, settings, changes, generation, why), seconds
            )
        )

    @staticmethod
    def _prepare(settings: Settings) -> None:
        """Set what children inherit of this process."""
        record.bound(settings.smtp.max_message_bytes)
        encryption.reload()

    def _end(self, asked: Asked, settings: Settings, changes: Sequence[Difference], generation: int, why: str) -> None:
        self._is_under_way = False
        if why:
            maillog.notice("error", "not reloaded", reason=why)
            self._prepare(self.settings)
        else:
            self.settings = settings
            name = f"smtp-dup-{self.processes.role.name}"
            log_lines.configure(settings.log.level, settings.log.format, name, threads=False)
            words = "; ".join(f"{change.key}: {change.before} -> {change.after}" for change in changes)
            maillog.notice("info", "reloaded", generation=generation, changes=words)
            self.on_taken(settings, generation)
            before, after = ("; ".join(f"{c.key}={value(c)}" for c in changes) for value in (_BEFORE, _AFTER))
            details = {"role": self.processes.role.name, "generation": str(generation)}
            self.record(Act("reload", before, after, details=details, who=asked.who))
        if not self.supervisor.is_stopping:
            notify("READY=1")
        asked.tell({**self._state(), "ended": True, "taken": not why, "reason": why})
        while self._waiting and not self._is_under_way:
            self._begin(self._waiting.popleft())

    # What is told

    def _state(self) -> dict[str, Any]:
        slots = self.supervisor.slots
        return {
            "role": self.processes.role.name,
            "generation": self.supervisor.generation,
            "processes": [
                {
                    "name": slot.child.name,
                    "pid": slot.process.pid,
                    "generation": slot.child.generation or self.supervisor.generation,
                    "ready": slot.is_ready,
                    "leaving": slot.is_leaving,
                }
                for slot in slots
                if slot.process and (slot.child.generation or slot.is_temporary)
            ],
        }

    @staticmethod
    def _log(answer: dict[str, Any]) -> None:
        if reason := answer.get("refused") or "; ".join(answer.get("problems", ())):
            maillog.notice("error", "not reloaded", reason=reason)
        if left := answer.get("takes_restart"):
            maillog.notice("warning", "takes a restart", options=", ".join(change["key"] for change in left))
