"""Recipients that need different primaries, with a real Postfix in front: the ways out of docs/routes.md."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from support.mail_site import StartPostfix
from support.postfix_instance import PostfixInstance
from support.product import Product
from support.scripted_server import ScriptedServer
from support.waiting import free_port

pytestmark = pytest.mark.postfix

ROUTE = """
[[server]]
name = "shop"
url = "{address}"
[[route]]
name = "shop"
match = {match}
primary = "shop"
split = "{split}"
"""
MESSAGES = 20


@pytest.mark.parametrize("way", ["nothing set", "one recipient at a time", "two ports", "fork"])
def test_both_are_delivered_and_none_at_the_wrong_server(
    product: Callable[..., Product], postfix: StartPostfix, scripted: Callable[..., ScriptedServer], way: str
) -> None:
    """Whatever Postfix is told, each recipient has its mail at its own server, once; without a way out after a 452."""
    old, shop = scripted(), scripted()
    port = free_port()
    match = f'{{ listen = ":{port}" }}' if way == "two ports" else '{ recipients = "@shop.example" }'
    split = "fork" if way == "fork" else "defer"
    files = {"settings.toml": ROUTE.format(address=shop.address, match=match, split=split)}
    relay = product(primary=f"old={old.address}", files=files, start=False)
    relay.settings["smtp.listen"] += f",127.0.0.1:{port}"
    relay.start()
    if way == "two ports":
        maps = f"inline:{{ {{shop.example = smtp:[127.0.0.1]:{port}}} {{* = smtp:[127.0.0.1]:{relay.smtp_port}}} }}"
        front = postfix(PostfixInstance({"transport_maps": maps}, name="front"))
    else:
        limit = {"smtp_destination_recipient_limit": "1"} if way == "one recipient at a time" else {}
        front = postfix(PostfixInstance.front(relay.smtp_port, **limit))
    for n in range(MESSAGES):
        front.submit(f"s{n}@example.org", ["one@shop.example", "two@example.com"], b"Subject: x\r\n\r\nx\r\n")
    old.wait_for(MESSAGES)
    shop.wait_for(MESSAGES)
    senders = sorted(f"s{n}@example.org" for n in range(MESSAGES))
    for server, recipient in ((old, "two@example.com"), (shop, "one@shop.example")):
        assert sorted(t.sender for t in server.messages) == senders
        assert {tuple(t.recipients) for t in server.messages} == {(recipient,)}
    assert (relay.metric("smtpdup_split_total", how="defer") > 0) is (way == "nothing set")
    assert relay.metric("smtpdup_split_total", how="fork") == (MESSAGES if way == "fork" else 0)
