"""The processes behind `up`, `relay` and `workers`: what is started, in which order, with which seams joined.

The one place besides the commands that knows relay and workers alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace

from redis.exceptions import RedisError

from relay import log_lines, maillog
from relay.config.destinations import is_loopback
from relay.config.loader import Problem, Settings, SettingsError
from relay.config.model import SmtpSettings, StatusSettings
from relay.daemon import ledger_redis, running, start
from relay.daemon.busy_destinations import BusyDestinations
from relay.daemon.child_processes import ChildProcesses
from relay.daemon.child_status import ChildStatus
from relay.daemon.control import Control
from relay.daemon.reload import Read, Reload
from relay.daemon.renewal import Roster
from relay.daemon.retired_destinations import RetiredDestinations
from relay.daemon.slots import Child
from relay.daemon.start import EarlyStop, Role, StartError
from relay.daemon.supervisor import Supervisor
from relay.daemon.worker_children import are_shared
from relay.ledger import audit
from relay.ledger.audit import Act
from relay.ledger.continuity import Continuity
from relay.mail import encryption, record
from relay.mail.destination import Destination
from relay.monitoring.listener import bind
from relay.page import hosts, users
from relay.redisio.clients import sync_client
from relay.routing import loading
from relay.server import listening, systemd
from relay.topology import promotion, remembered
from relay.topology.roles import disagreement

_PATIENCE = 1.0  # seconds for Redis to say who was promoted: the relay follows in any case


def run(settings: Settings, role: Role, extra: Sequence[Child] = (), read: Read | None = None) -> int:
    """Start everything, keep it running until a signal, drain. Returns the exit status.

    With ``read`` the settings can be reloaded. Raises StartError, and SettingsError where systemd has bound other
    addresses than they name.
    """
    log_lines.configure(settings.log.level, settings.log.format, f"smtp-dup-{role.name}", threads=False)
    try:
        encryption.use(settings.storage.key_file)
        record.bound(settings.smtp.max_message_bytes)
    except encryption.BadKeyFile as error:
        raise StartError(f"storage.key_file: {error}") from error
    given, settings = settings, start.fitted(settings, role)
    early = EarlyStop()
    with ExitStack() as ends:
        start.make_state_dir(settings.state_dir)
        start.warn_of_settings_files(settings)
        start.take(settings.state_dir, role, ends)
        if role.relays and (faults := loading.faults(settings, only_without_former=True)):
            raise SettingsError([Problem("", "", text) for text in faults])
        arena = start.arena(f"smtp-dup-{role.name}")
        try:
            places = listening.listen(settings) if role.relays else []
            users.check(settings.status)
            listener = bind(settings)
        except systemd.NotAsSet as error:
            raise SettingsError([Problem("smtp.listen", "socket activation", str(error))]) from error
        except OSError as error:
            raise StartError(str(error)) from error
        url, children = ledger_redis.redis_of(settings, role, ends)
        settings = replace(settings, redis=settings.redis.at(url))
        ledger_redis.warn_of_lost_promises(settings, url)
        continuity = _continuity(settings)
        ledger_redis.register(settings, continuity, role)
        child_status = ChildStatus()
        processes = ChildProcesses(role, url, places, listener, arena, child_status, start.trace_channel())
        children += [*processes.of(settings), *map(processes.fitted, extra)]
        early.check()
        supervisor = Supervisor(
            children,
            on_ready=lambda: _tell(settings, role),
            roster=_roster(processes, settings, continuity),
            child_status=child_status,
        )
        if read is not None:
            _let_reload(supervisor, processes, given, read, ends)
        status_code = supervisor.run()
        early.end()
        return status_code


def _roster(
    processes: ChildProcesses, settings: Settings, continuity: Continuity, former: Iterable[Destination] = ()
) -> Roster:
    if not processes.role.delivers:
        return RetiredDestinations(settings, None, continuity, former)

    def workers_for(destination: Destination) -> list[Child]:
        return processes.workers(settings, [destination])

    retired = RetiredDestinations(settings, workers_for, continuity, former)
    if not are_shared(settings):
        return retired
    busy = BusyDestinations(settings, workers_for)

    def further() -> Sequence[Child] | None:
        found = [retired(), busy()]
        return None if None in found else [child for children in found for child in children or ()]

    return further


def _let_reload(
    supervisor: Supervisor, processes: ChildProcesses, given: Settings, read: Read, ends: ExitStack
) -> None:
    """Have the settings reloaded when somebody asks, and known to the commands."""
    state_dir, role = given.state_dir, processes.role.name
    known: dict[str, Destination] = {}

    def roster_for(settings: Settings) -> Roster:
        return _roster(processes, settings, _continuity(settings), known.values())

    def on_taken(settings: Settings, generation: int) -> None:
        known.update((backup.name, backup) for backup in settings.copied)
        running.write(state_dir, role, settings, generation)

    def record(act: Act) -> None:
        redis = given.redis.at(processes.url)
        with suppress(RedisError, OSError), sync_client(redis, _PATIENCE, retries=0) as client:
            audit.add(client, act)

    reload = Reload(given, read, processes, supervisor, roster_for, on_taken, record)
    supervisor.on_reload = reload.hang_up
    control = Control(state_dir, role, supervisor.watch, supervisor.forget, reload.answer)
    control.open()
    ends.callback(control.close)
    on_taken(given, supervisor.generation)
    ends.callback(running.remove, state_dir, role)


def _continuity(settings: Settings) -> Continuity:
    return Continuity(settings.copied, settings.state_dir, replicas=settings.redis.replicas)


def _tell(settings: Settings, role: Role) -> None:
    if role.relays and settings.primary:
        for address in settings.smtp.listen.split(","):
            maillog.notice("info", "listening", smtp=address.strip(), processes=settings.smtp.process_count)
        maillog.notice("info", "primary", address=settings.primary.address)
        _tell_who_was_promoted(settings)
        _tell_who_is_let_in(settings.smtp)
    for backup in settings.copied:
        maillog.notice("info", "backup", name=backup.name, address=backup.address)
    if not settings.copied:
        maillog.notice("warning", "no backup is configured: mail is relayed, nothing is copied")
    if settings.status.listen:
        maillog.notice("info", "status", address=f"http://{settings.status.listen}")
        _tell_of_the_page(settings.status)


def _tell_of_the_page(status: StatusSettings) -> None:
    if hosts.is_off(status):
        maillog.notice("info", "the page is off: others can reach it, and status.users_file names nobody")
        return
    maillog.notice("info", "page", address=hosts.address(status), hint="`smtp-dup open` prints a link that lets you in")
    if hosts.is_reached_from_outside(status) and not any(host.is_tls for host in status.hosts):
        maillog.notice(
            "warning",
            "passwords for the page are sent in the clear: have a proxy in front speak TLS and name it in status.hosts "
            "(https://...)",
            listening=status.listen,
        )


def _tell_who_was_promoted(settings: Settings) -> None:
    """Say it where the settings are not the last word on who is the primary."""
    topology = remembered.load(settings.state_dir)
    patience = min(_PATIENCE, settings.redis.timeout_seconds)
    with suppress(RedisError, OSError), sync_client(settings.redis, patience, retries=0) as client:
        topology = promotion.standing(client, settings)
    if words := disagreement(settings, topology):
        maillog.notice("warning", "settings and topology disagree", reason=words)
    elif topology:
        maillog.notice("info", "settings and topology agree", epoch=topology.epoch, primary=topology.primary)


def _tell_who_is_let_in(smtp: SmtpSettings) -> None:
    """Say it where somebody listens to the world and hears nobody."""
    addresses = smtp.addresses + smtp.tls_addresses
    public = smtp.proxy_protocol or any(not is_loopback(host) for host, _ in addresses)
    if public and smtp.users_file is None and all(network.is_loopback for network in smtp.allowed_networks):
        maillog.notice(
            "warning",
            "only clients on this machine are let in: set smtp.allowed_networks to your clients' networks "
            "(or smtp.users_file, for clients that log in)",
            listening=smtp.listen,
        )
