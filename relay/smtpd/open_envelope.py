"""The envelope of a transaction while MAIL and RCPT fill it, with the memory that its addresses take."""

from __future__ import annotations

from collections.abc import Mapping

from relay.mail.envelope import Envelope
from relay.mail.esmtp import MAIL_EXTENSIONS, command_line
from relay.mail.recipient import Recipient
from relay.smtpd.peer import Peer
from relay.smtpd.primary_choice import PrimaryChoice
from relay.smtpd.shared_counters import ProcessCounters
from relay.smtpd.syntax import carried

_ENTRY = 200  # octets of memory that an address takes besides its text


class OpenEnvelope:
    """What MAIL and RCPT have said of one message, and who is to have it. ``close`` must be called."""

    __slots__ = ("_counted", "_counters", "_peer", "choice", "id", "identity", "parameters", "recipients", "sender")

    def __init__(
        self,
        sender: str,
        parameters: tuple[str, ...],
        peer: Peer,
        choice: PrimaryChoice,
        counters: ProcessCounters,
    ) -> None:
        self.id = ""  # of the message, once it has one
        self.sender = sender
        self.parameters = parameters
        self.recipients: list[Recipient] = []
        self.identity = peer.identity()
        self.choice = choice
        self._peer = peer
        self._counters = counters
        self._counted = 0  # octets, as added to the shared counters

    def count(self, octets: int) -> None:
        """Count the approximate memory of an address."""
        self._counted += octets + _ENTRY
        self._counters.add_octets(octets + _ENTRY)

    def close(self) -> None:
        """End the choice of the primary, and remove the addresses from the counters."""
        self._counters.add_octets(-self._counted)
        self._counted = 0
        self.choice.end()

    def mail_command(self, available: Mapping[str, str]) -> bytes:
        """Return MAIL for a server with these extensions. Raises SyntaxProblem."""
        given = self.parameters
        return command_line("MAIL FROM", self.sender, carried(given, MAIL_EXTENSIONS, available) if given else ())

    def sealed(self, received_at: float, size: int = 0, message_id: str = "") -> Envelope:
        """Return the envelope of the message as it is now. Raises OSError, where a table of routes cannot be read."""
        copies, promised, route = self.choice.copies(self.recipients)
        return Envelope(
            id=self.id,
            sender=self.sender,
            recipients=tuple(self.recipients),
            received_at=received_at,
            size=size,
            parameters=self.parameters,
            client_address=self._peer.address,
            client_helo=self._peer.helo,
            destinations=copies,
            identity=self.identity if self._peer.is_spoken_for else (),
            promised=promised,
            message_id=message_id,
            route=route,
        )
