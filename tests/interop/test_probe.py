"""Real servers, as they come, are asked about many who do not exist without hanging up, slowing down, or any mail."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from relay.cockpit.mailbox_probe import Exists, MailboxProbe, Manner
from relay.mail.destination import Destination
from support import dovecot_instance
from support.dovecot_instance import DovecotInstance
from support.exim_instance import EximInstance
from support.ledger_contents import settings
from support.postfix_instance import PostfixInstance

_KNOWN = [f"u{n}@example.com" for n in range(0, 40, 10)]
_ASKED = [f"u{n}@example.com" for n in range(40)]
_MANNER = Manner("postmaster@relay.example", per_connection=40, most_alike=20)


def asked(port: int, scheme: str = "smtp") -> dict[str, Exists]:
    """Ask about forty of whom four exist; returns what was said, and fails where it ended early."""
    found: dict[str, Exists] = {}
    server = Destination("new", "127.0.0.1", port, scheme=scheme)
    asking = MailboxProbe(
        settings(smtp_domain="relay.example"), server, _MANNER, lambda one: found.__setitem__(one.address, one.result)
    )
    asyncio.run(asking.ask(_ASKED))
    assert not asking.trouble
    return found


EXPECTED = {address: Exists.YES if address in _KNOWN else Exists.NO for address in _ASKED}


@pytest.mark.postfix
def test_postfix(postfix: Callable[[PostfixInstance], PostfixInstance]) -> None:
    """With its own limits: 10 errors before it delays, 20 before it hangs up. A catch-all is seen as one."""
    boxes = " ".join(f"{{{address} = all/}}" for address in _KNOWN)
    defaults = {"smtpd_error_sleep_time": "1s", "smtpd_hard_error_limit": "20", "smtpd_soft_error_limit": "10"}
    store = postfix(PostfixInstance.store(virtual_mailbox_maps=f"inline:{{ {boxes} }}", **defaults))
    begun = time.monotonic()
    assert asked(store.port) == EXPECTED
    assert time.monotonic() - begun < 10  # a second for each refusal after the tenth would be more
    assert "too many errors" not in store.log
    assert not store.maildir_messages()
    assert store.queue_empty()
    anybody = postfix(PostfixInstance.store())
    assert set(asked(anybody.port).values()) == {Exists.UNTOLD}


def test_exim(exim_program: Path) -> None:
    """With its own limits, and with a local part that it does not know or a domain that is not its own."""
    refused = ["! u0 : ! u10 : ! u20 : ! u30"]
    instance = EximInstance(exim_program, refused=refused, session_limits=False)
    with ExitStack() as ends:
        ends.callback(instance.remove)
        instance.start()
        assert asked(instance.port) == EXPECTED
        instance.configure()
        assert set(asked(instance.port).values()) == {Exists.UNTOLD}


def test_dovecot() -> None:
    """Over LMTP."""
    if reason := dovecot_instance.unavailable():
        pytest.skip(reason)
    instance = DovecotInstance(_KNOWN)
    with ExitStack() as ends:
        ends.callback(instance.remove)
        instance.start()
        assert asked(instance.port, "lmtp") == EXPECTED
