"""What is known of a backup when somebody asks whether it is ready: values only, so that every criterion is a function.

What nobody could tell is a Missing with the reason, never a zero: it makes the criterion unknown, and unknown is not
ready.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from relay.config.model import ReadySettings
from relay.ledger.divergence_groups import Outage
from relay.ledger.flow import Flow
from relay.ledger.greetings import Greeting
from relay.ledger.hosts import Host, Reach
from relay.ledger.overview import Summary
from relay.ledger.probe_evidence import ProbeEvidence
from relay.mail.destination import Destination


@dataclass(frozen=True, slots=True)
class Missing:
    """What cannot be told: why, and how to find out."""

    why: str


@dataclass(frozen=True, slots=True)
class OpenGroup:
    """Recipients that a backup answered otherwise than the primary, all with the same words, and not acknowledged."""

    text: str
    recipients: int


@dataclass(frozen=True, slots=True)
class Refusals:
    """What a backup refused for good, or what was given up; ``acknowledged`` groups have been looked at."""

    groups: Sequence[OpenGroup] = ()
    acknowledged: int = 0


@dataclass(frozen=True, slots=True)
class Deferrals:
    """What a backup put off: still owed for over an hour, and delivered soon after all; of so many ``seen``."""

    open: int = 0
    delivered: int = 0
    seen: int = 0


@dataclass(frozen=True, slots=True)
class Domain:
    """What became of the copies for the recipients of one domain."""

    delivered: int
    others: int


@dataclass(frozen=True, slots=True)
class Restraint:
    """What an operator has set that keeps a backup from getting the mail as it is."""

    held: str = ""  # "by alice since 10:02"
    throttled: str = ""


@dataclass(frozen=True, slots=True)
class Relay:
    """A relay process; ``age`` of its last sign of life, ``generation`` of its settings, ``epoch`` of its roles."""

    label: str
    age: float
    is_alive: bool
    generation: int = 0
    epoch: int = 0
    trouble: str = ""


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that is known of the backup ``name`` at the moment ``now``, and of the primary ``old``.

    ``hours`` are those of 35 days, the last one not over, and ``day`` the last 24 of them. A message has been uncertain
    for ``uncertain_late_s`` longer than it may be.
    """

    name: str
    old: str
    now: float
    compared: Sequence[str] = ()  # the servers whose speed it is measured by, in place of ``old``
    ready: ReadySettings = field(default_factory=ReadySettings)
    destination: Destination | None = None
    restraint: Restraint = field(default_factory=Restraint)
    first: float | None = None  # when the first copy came, as far as that is remembered
    hours: Sequence[Flow] = ()
    day: Flow = field(default_factory=lambda: Flow(0.0, 0.0))
    summary: Summary | None = None
    refusals: Refusals | Missing = field(default_factory=Refusals)
    deferrals: Deferrals | Missing = field(default_factory=Deferrals)
    outages: Sequence[Outage] | Missing = ()
    domains: Mapping[str, Domain] | Missing = field(default_factory=dict)
    old_greeting: Greeting | None = None
    new_greeting: Greeting | None = None
    relays: Sequence[Relay] = ()
    differences: Sequence[str] = ()  # between the settings of their hosts
    hosts: Sequence[Host] = ()
    reaches: Sequence[Reach] = ()  # of the new server
    old_reaches: Sequence[Reach] = ()
    uncertain_late_s: float = 0.0
    probed: Sequence[ProbeEvidence] = ()  # about recipients that should exist: of a list, and those seen
    probed_refusals: ProbeEvidence | None = None  # about those that it refuses
