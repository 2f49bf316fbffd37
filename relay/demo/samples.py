"""The messages of the demo, with what has become of each."""

from __future__ import annotations

from dataclasses import dataclass, field
from email.message import EmailMessage

SENDER = "sender@example.org"


@dataclass(slots=True, eq=False)
class Sample:
    """One message, and its replies and state so far."""

    title: str
    recipients: tuple[str, ...]
    text: str = "This is a demonstration.\n"
    attachment: bytes = b""
    heard: str = ""
    answers: str = "old"  # which server its client's replies are from
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
        message["From"] = f"A sender <{SENDER}>"
        message["To"] = ", ".join(self.recipients)
        message["Subject"] = self.title
        message.set_content(self.text)
        if self.attachment:
            message.add_attachment(self.attachment, maintype="application", subtype="octet-stream", filename="data.bin")
        return message


def samples(*, routes: bool = False) -> list[Sample]:
    """Return the messages with which it begins; servers.py defines the replies for each recipient.

    With ``routes`` some are for shop.example, whose mail has a server of its own.
    """
    to_the_shop = [
        Sample("For the shop", ("anna@shop.example",)),
        Sample("For both", ("frank@example.com", "ben@shop.example")),
    ]
    return [
        Sample("A plain message", ("alice@example.com",)),
        Sample("Grüße and a file", ("bob@example.com",), "Schöne Grüße\n", bytes(range(256)) * 100),
        Sample("Old refuses it", ("zoe@example.com",)),
        Sample("Old refuses one", ("carol@example.com", "gone@example.com")),
        Sample("New defers it", ("dave@example.com",)),
        Sample("New refuses it", ("erin@example.com",)),
        *(to_the_shop if routes else ()),
    ]
