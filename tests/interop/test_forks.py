"""A message that forks to a real server which refuses it late: by DATA's and the dot's restrictions, a milter, an ACL.

Whatever that says, the client hears the 250 of the server that took it; who refused it for good has it on its failed
list, who only put it off gets its copy, and nobody has it twice.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from support.exim_instance import EximInstance
from support.mail_site import StartPostfix
from support.milter import HANGS_UP, Milter
from support.postfix_instance import PostfixInstance
from support.product import QUICK, Product
from support.scripted_server import ScriptedServer
from support.waiting import wait_until

_ROUTE = """
[[server]]
name = "shop"
url = "{address}"
[[route]]
name = "shop"
match = {{ recipients = "@shop.example" }}
primary = "shop"
split = "fork"
"""
TAKEN, PUT_OFF, REFUSED = "taken", "put off", "refused"
_ACTIONS = {  # of Postfix's access(5), and what becomes of the copy
    "reject": ("REJECT no", REFUSED),
    "defer": ("DEFER later", PUT_OFF),
    "421": ("421 4.7.0 go away", PUT_OFF),
    "521": ("521 5.7.1 go away", REFUSED),
    "discard": ("DISCARD", TAKEN),
    "hold": ("HOLD", TAKEN),
}
_MILTER = {
    "reject": (b"r", REFUSED),
    "tempfail": (b"t", PUT_OFF),
    "code": (b"y554 5.7.1 no such words\0", REFUSED),
    "discard": (b"d", TAKEN),
    "dies": (HANGS_UP, PUT_OFF),
}


def _access(stage: str) -> str:
    entries = " ".join(f"{{ {stage}.{name}@example.org = {action} }}" for name, (action, _) in _ACTIONS.items())
    return f"check_sender_access inline:{{ {entries} }}"


class Fork:
    """The product with a scripted server for the default, and a real one for shop.example."""

    def __init__(self, product: Callable[..., Product], old: ScriptedServer, address: str) -> None:
        files = {"settings.toml": _ROUTE.format(address=address)}
        self.old = old
        self.product = product(primary=f"old={old.address}", files=files, settings=QUICK)

    def send(self, sender: str, *, shop_first: bool) -> None:
        """Send a message to one recipient of each."""
        recipients = ["one@shop.example", "two@example.com"]
        with self.product.dialogue() as client:
            client.hello()
            text = f"X-Sender: {sender}\r\n\r\nx\r\n"
            client.mail(sender, *(recipients if shop_first else recipients[::-1]), data=text.encode())
            client.quit()

    def audit(self, expected: dict[str, str]) -> None:
        """Each sender's copy ends as it should, and the other server has each message once."""

        def ends() -> dict[str, str]:
            failed = {row["sender"]: REFUSED for row in self.product.json("failed", "list", "--destination", "shop")}
            waits = {row["sender"]: PUT_OFF for row in self.product.json("queue", "list", "--destination", "shop")}
            return {**dict.fromkeys(expected, TAKEN), **failed, **waits}

        wait_until(lambda: ends() == expected, message=lambda: f"{ends()}\n{self.product.log[-6000:]}", interval=0.5)
        assert sorted(m.sender for m in self.old.messages) == sorted(expected)
        assert all(m.recipients == ["two@example.com"] for m in self.old.messages)
        events = self.product.events
        refused = sum(event["event"] == "split refused" for event in events)
        copied = sum(event["event"] == "split copied" for event in events)
        kinds = list(expected.values())
        assert (refused, copied) == (kinds.count(REFUSED), kinds.count(PUT_OFF))


@pytest.mark.postfix
@pytest.mark.parametrize("shop_first", [True, False])
def test_postfix_refuses_late(
    product: Callable[..., Product], postfix: StartPostfix, scripted: Callable[..., ScriptedServer], shop_first: bool
) -> None:
    """Restrictions at DATA and at its end, header_checks, and each answer of a milter."""
    expected = {f"{stage}.{name}@example.org": end for stage in ("data", "end") for name, (_, end) in _ACTIONS.items()}
    milter = {f"milter.{name}@example.org": answer for name, (answer, _) in _MILTER.items()}
    expected |= {f"milter.{name}@example.org": end for name, (_, end) in _MILTER.items()}
    expected |= {"header.reject@example.org": REFUSED, "plain@example.org": TAKEN}
    with Milter(milter) as answers:
        shop = postfix(
            PostfixInstance.store(
                ("shop.example",),
                smtpd_data_restrictions=_access("data"),
                smtpd_end_of_data_restrictions=_access("end"),
                smtpd_milters=answers.address,
                milter_default_action="tempfail",
                header_checks="regexp:$mailboxes/../etc/checks",
            )
        )
        checks = shop.directory / "etc" / "checks"
        checks.write_text("/^X-Sender: header.reject/ REJECT no such headers\n")
        fork = Fork(product, scripted(), shop.address)
        for sender in expected:
            fork.send(sender, shop_first=shop_first)
        fork.audit(expected)
        assert len(shop.maildir_messages()) == 1  # the rest of what it took it has thrown away, or holds


_ACL = {  # Exim's words, and what becomes of the copy
    "deny": REFUSED,
    "defer": PUT_OFF,
    "drop": REFUSED,
    "discard": TAKEN,
}


@pytest.mark.parametrize("shop_first", [True, False])
def test_exim_refuses_late(
    product: Callable[..., Product], exim_program: Path, scripted: Callable[..., ScriptedServer], shop_first: bool
) -> None:
    """Its ACLs at DATA and at the end of it: deny, defer, drop, which hangs up, and discard."""
    lines = {stage: [f"  {word} senders = {stage}.{word}@example.org" for word in _ACL] for stage in ("data", "end")}
    del lines["data"][-1]  # nothing is discarded before it has come
    expected = {f"{stage}.{word}@example.org": end for stage in lines for word, end in _ACL.items()}
    del expected["data.discard@example.org"]
    expected["plain@example.org"] = TAKEN
    shop = EximInstance(exim_program, ["shop.example"], before_content=lines["data"], content=lines["end"])
    try:
        fork = Fork(product, scripted(), shop.start().address)
        for sender in expected:
            fork.send(sender, shop_first=shop_first)
        fork.audit(expected)
        assert len(shop.wait_for(1)) == 1
    finally:
        shop.remove()
