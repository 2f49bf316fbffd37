"""What is counted of accepted mail: who gets copies, and which extensions and sizes it needs of a server.

So two servers can be compared by what mail has needed of them.
"""

from __future__ import annotations

from operator import attrgetter

from relay import metrics
from relay.mail.envelope import Envelope
from relay.mail.esmtp import MAIL_EXTENSIONS, value

_parameters = attrgetter("parameters")
_SMTPUTF8, _EIGHT_BIT, _DSN = (metrics.features.labels(name) for name in metrics.MAIL_FEATURES)


def note(envelope: Envelope) -> None:
    """Count a message's copies, and what it needs that not every server has."""
    for name in envelope.destinations:
        metrics.increment(metrics.copies, name)(1)
    metrics.largest_message.note(envelope.size)
    metrics.most_recipients.note(len(envelope.recipients))
    given = envelope.parameters
    if given:
        if value(given, "SMTPUTF8") is not None:
            _SMTPUTF8.inc()
        if (value(given, "BODY") or "7BIT").upper() != "7BIT":
            _EIGHT_BIT.inc()
    of_mail = [MAIL_EXTENSIONS.get(p.partition("=")[0].upper()) for p in given] if given else ()
    if "DSN" in of_mail or any(map(_parameters, envelope.recipients)):
        _DSN.inc()  # the RCPT parameters are NOTIFY and ORCPT, both from RFC 3461
