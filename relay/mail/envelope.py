"""An envelope with its recipients, and its stored form. Frozen; nothing here does I/O."""

from __future__ import annotations

from typing import Any, NamedTuple

from relay.mail.destination import Destination
from relay.mail.ids import is_destination_name, is_id
from relay.mail.recipient import Recipient
from relay.mail.stored import LATEST, any_text, line, number, parsed, texts, to_json
from relay.mail.text import printable

# What a record need not have, by its names there.
_OPTIONAL: dict[str, Any] = {"mail": [], "addr": "", "helo": "", "dest": [], "xf": [], "mid": "", "route": "", "of": ""}


class MalformedRecord(ValueError):
    """A stored message that this version cannot read; the caller sets it aside and never drops it."""


class Envelope(NamedTuple):
    """Sender, recipients and origin of a message.

    Addresses are str with surrogateescape, so that octets that are no UTF-8 survive; the null sender is "".
    ``received_at`` is seconds since the epoch. ``size`` counts the octets of the body in wire form.
    """

    id: str
    sender: str
    recipients: tuple[Recipient, ...]
    received_at: float
    size: int
    parameters: tuple[str, ...] = ()  # of MAIL: BODY=8BITMIME, SMTPUTF8, RET=..., ENVID=...
    client_address: str = ""
    client_helo: str = ""
    destinations: tuple[str, ...] = ()  # names of the backups that get a copy
    identity: tuple[tuple[str, str], ...] = ()  # XFORWARD attributes of the original client, to pass on
    # (backup, indices of its recipients), for each backup that does not get all. None: an old record, without it.
    promised: tuple[tuple[str, tuple[int, ...]], ...] | None = None
    message_id: str = ""  # the Message-ID field, for the log and the trace
    route: str = ""  # names of the routes that its recipients took, with commas; "" where there are none
    spare_of: str = ""  # id of the message that went to several primaries, of one that is kept for one of them

    def to_json(self) -> bytes:
        """Return the wire form, version 1."""
        record: dict[str, Any] = {
            "id": self.id,
            "from": self.sender,
            "to": [(address, *parameters) if parameters else (address,) for address, parameters in self.recipients],
            "at": round(self.received_at, 3),
            "size": self.size,
        }
        # Written out: a loop over these takes as long as the JSON.
        if self.parameters:
            record["mail"] = self.parameters
        if self.client_address:
            record["addr"] = self.client_address
        if self.client_helo:
            record["helo"] = self.client_helo
        if self.destinations:
            record["dest"] = self.destinations
        if self.identity:
            record["xf"] = self.identity
        if self.message_id:
            record["mid"] = self.message_id
        if self.route:
            record["route"] = self.route
        if self.spare_of:
            record["of"] = self.spare_of
        if self.promised is not None:
            record["for"] = dict(self.promised)
        return to_json(record).encode("ascii")

    @classmethod
    def from_json(cls, data: bytes) -> Envelope:
        """Read the wire form. Raises MalformedRecord."""
        try:
            record = {**_OPTIONAL, **parsed(data)}
            envelope = cls(
                id=record["id"],
                sender=line(record["from"]),
                recipients=tuple([Recipient(line(to[0]), texts(to[1:])) for to in record["to"]]),
                received_at=number(record["at"]),
                size=record["size"],
                parameters=texts(record["mail"]),
                client_address=record["addr"],
                client_helo=record["helo"],
                destinations=texts(record["dest"]),
                identity=tuple([(any_text(name), any_text(value)) for name, value in record["xf"]]),
                promised=_promised(record["for"], len(record["to"])) if "for" in record else None,
                message_id=record["mid"],
                route=record["route"],
                spare_of=record["of"] if record["of"] and is_id(record["of"]) else "",
            )
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise MalformedRecord(f"unreadable envelope: {printable(str(error))}") from error
        if {*map(type, (envelope.client_address, envelope.client_helo, envelope.message_id, envelope.route))} != {str}:
            raise MalformedRecord("unreadable envelope: not a text")
        if not 0 <= envelope.received_at < LATEST:
            raise MalformedRecord("unreadable envelope: the time is none")
        if not is_id(envelope.id) or type(envelope.size) is not int or envelope.size < 0:
            raise MalformedRecord("unreadable envelope: no id or no size")
        if not all(map(is_destination_name, envelope.destinations)):
            raise MalformedRecord("unreadable envelope: the name of a backup is none")
        return envelope

    def owed_to(self, destination: Destination) -> tuple[int, ...]:
        """Return the indices of the recipients for whom this destination was promised a copy at acceptance.

        Later changes of the settings do not matter. Only an old record does not hold the promise: then today's domain
        filter applies, and if it leaves no recipient, all are owed, since a superfluous copy is better than a lost one.
        A destination that the envelope does not name got the copy by `move`: all recipients are owed, unless the
        state of the copy says otherwise.
        """
        everybody = tuple(range(len(self.recipients)))
        if self.promised is None:
            return tuple(i for i in everybody if destination.wants(self.recipients[i])) or everybody
        return dict(self.promised).get(destination.name, everybody) if self.promised else everybody


def _promised(record: dict[str, list[int]], recipients: int) -> tuple[tuple[str, tuple[int, ...]], ...]:
    if record == {}:  # nearly always: each backup gets all
        return ()
    promised = tuple((name, tuple(indices)) for name, indices in record.items())
    if not all(indices and all(type(i) is int and 0 <= i < recipients for i in indices) for _, indices in promised):
        raise ValueError("a copy is promised to recipients that it does not have")
    return promised
