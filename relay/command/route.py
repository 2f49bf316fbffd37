"""`route`: which route an address takes, who answers for it, who gets copies, and why."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from relay.cockpit import changeover
from relay.cockpit.formatting import moment
from relay.command.connection import ledger_of
from relay.command.exit_status import NO, WELL, CannotSay, Misuse, Trouble
from relay.command.output import Output
from relay.config.loader import Settings
from relay.config.types import listen_addresses
from relay.mail.address_keys import lookup_keys
from relay.mail.addresses import parsed
from relay.mail.recipient import Recipient
from relay.mail.text import printable
from relay.redisio import embedded
from relay.routing import loading, moved_copy
from relay.routing.decisions import RouteDecision, owed
from relay.routing.moved_copy import MovedMap
from relay.routing.table_store import Table
from relay.smtpd.peer import AUTH_FIRST, STRANGER
from relay.smtpd.recipients import NOT_RELAYED, is_relayed, typed_path
from relay.smtpd.syntax import SyntaxProblem
from relay.topology import moving, promotion
from relay.topology.roles import Roles, as_settings_say, decided

_HERE = "127.0.0.1"  # where no client is given, whose network is not looked at then


def show(settings: Settings, out: Output, *, address: str, sender: str, client: str, listen: str) -> int:
    """Show it. Says no where a table cannot be read, or the relay refuses it by itself. Raises Misuse, BadTable."""
    local = _address(listen, settings)
    recipient, sender = _path(address, "TO"), _path(sender, "FROM")
    if client and parsed(client) is None:
        raise Misuse(f"--client: expected an IP address, not {printable(client)}")
    warnings: list[str] = []
    tables = loading.tables_as_they_are(settings, warnings.append)
    held, unusable = _held(settings)
    roles, told = _from_redis(settings, recipient)
    moved = held or told or moved_copy.NOBODY
    if unusable and told is None:
        warnings.append(f"{unusable}, and Redis does not answer")
    default, backups = roles.primary.name, [backup.name for backup in roles.backups]
    router = loading.router_of(settings, tables, moved).with_routes(roles.routes)
    # The token stands for the message where that decides by weight: there is none.
    plan = router.plan(default, sender, client or _HERE, local, token="message")  # noqa: S106  (no password)
    try:
        decision = plan.decide(recipient)
    except OSError as error:
        raise Trouble(str(error)) from error
    answered = decision.servers[0]
    by_name = {server.name: server for server in (*settings.named, *roles.backups)}
    served = [name for name in owed([decision], [answered], backups) if name in by_name]
    copies = [name for name in served if by_name[name].wants(Recipient(recipient))]  # `domains` of a backup
    row: dict[str, Any] = {
        "address": address,
        "route": decision.route.name,
        "primary": answered,
        "then": list(decision.servers[1:]),
        "backups": copies,
        "split": "" if decision.is_default else decision.route.split,
        "why": _why(decision, tables, moved),
        "weights": _weights(decision),
        "waits_for_recipient": plan.settled is None,
        "refused": _refused(settings, recipient, client),
    }
    if out.as_json:
        out.object({**row, "warnings": warnings})
    else:
        place = by_name[answered].address if answered in by_name else ""
        _tell(row, place if place != answered else "", changeover.answering(decision.route), warnings, out)
    return NO if warnings or row["refused"] else WELL


def _tell(row: dict[str, Any], place: str, weights: str, warnings: Sequence[str], out: Output) -> None:
    if row["refused"]:
        out.line(f"refused  by the relay itself: {row['refused']}; else")
    out.line(f"route    {row['route']}")
    out.line(f"primary  {row['primary']} ({place})" if place else f"primary  {row['primary']}")
    if row["split"] == "fork":
        out.line("split    fork: a message for recipients of other servers goes to each at once")
    if row["then"]:
        out.line(f"         then {', '.join(row['then'])}, where that cannot be used")
    out.line(f"copies   {', '.join(row['backups']) or 'none'}")
    if row["weights"]:
        out.line(f"weights  {weights}")
    out.line(f"why      {row['why']}")
    for warning in warnings:
        out.line(f"warning  {warning}")


def _refused(settings: Settings, recipient: str, client: str) -> str:
    """Return what the relay itself says to such a client or recipient, and the setting that has it so, else ""."""
    smtp = settings.smtp
    if client and not smtp.allows(client):
        told = AUTH_FIRST if smtp.users_file else STRANGER
        return f"{told.text}: {printable(client)} is not in smtp.allowed_networks"
    if not is_relayed(Recipient(recipient), smtp.allowed_domains):
        return f"{NOT_RELAYED.text}: smtp.allowed_domains"
    return ""


def _path(text: str, keyword: str) -> str:
    """Return an address as the relay reads it, with or without angle brackets. Raises Misuse for what it refuses."""
    try:
        return typed_path(text, keyword)
    except SyntaxProblem:
        shown = printable(text) or "nothing"
        raise Misuse(f"expected an address as in {keyword}:<user@example.com>, not {shown}") from None


def _address(listen: str, settings: Settings) -> tuple[str, int]:
    """Return the address of ours that a client is taken to have connected to."""
    if not listen:
        return settings.smtp.addresses[0]
    try:
        return listen_addresses(listen)[0]
    except (ValueError, IndexError):
        raise Misuse(f"--listen: expected host:port or :port, not {printable(listen)}") from None


def _from_redis(settings: Settings, address: str) -> tuple[Roles, MovedMap | None]:
    """Return who answers and who gets copies, by the last decision, and whether the address has moved.

    Where Redis cannot say, which is waited for once: as the settings say, and None.
    """
    roles = as_settings_say(settings)
    keys = lookup_keys(address, fold=settings.routes.fold_local)
    if settings.redis.url or embedded.socket_path(settings.state_dir).exists():
        with suppress(CannotSay), ledger_of(settings) as connection:
            topology = promotion.standing(connection, settings)
            roles = (topology and decided(settings, topology)) or roles
            found, _ = moving.entries(connection, keys)
            servers = dict.fromkeys((entry.server for entry in found.values()), 1)
            return roles, MovedMap(servers=servers, changes=found)
    return roles, None


def _weights(decision: RouteDecision) -> dict[str, float]:
    """Return how the mail of its route is shared, where it is."""
    route = decision.route
    return dict(zip(route.servers, route.weights, strict=True)) if route.weights else {}


def _held(settings: Settings) -> tuple[MovedMap | None, str]:
    """Return who has moved, as the relays of this host go by it, None where they have no copy; and what is wrong."""
    try:
        held = moved_copy.load(settings.state_dir)
    except OSError as error:
        return None, printable(f"this host's copy of who has moved cannot be used: {error}")
    return (held, "") if held.state.generation else (None, "")


def _why(decision: RouteDecision, tables: dict[Any, Table], moved: MovedMap) -> str:
    if decision.former is not None:
        entry = moved.entries([decision.key])[decision.key]
        note = f": {entry.note}" if entry.note else ""
        else_ = f"else {decision.former.servers[0]}, since {_why(decision.former, tables, moved)}"
        return f"{decision.key} was moved by {entry.by or 'somebody'} at {moment(entry.at)}{note}; {else_}"
    if decision.is_default:
        return "no route matches: the default one"
    if not decision.key:
        return f"{decision.route.name} is for every recipient ({decision.route.in_words()})"
    if decision.source is None:
        return f"{decision.key} in match.recipients of {decision.route.name}"
    line = tables[decision.source].line_of(decision.key)
    return f"{decision.key} in {decision.source}:{line}"
