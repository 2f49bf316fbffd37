"""SMTP conversations, as text files in the folder dialogues (README.txt there is their format): what a client
hears, and what reaches the primary of it, line by line. Each file's first line says which rule it is about.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from relay.smtpd.passwords import hash_password
from support.certificates import Certificate
from support.dialogue import Dialogue
from support.dialogue_files import Script, read, speak
from support.product import Product
from support.redis_servers import RedisServer
from support.scripted_server import EXTENSIONS, ScriptedServer
from support.waiting import free_port

FOLDER = Path(__file__).parent / "dialogues"
FILES = sorted(FOLDER.rglob("*.txt"))
SCRIPTS = sorted((read(path) for path in FILES if path.name != "README.txt"), key=lambda s: (str(s.group), s.path))
QUICK = {
    "smtp.processes": "1",
    "relay.timeout_seconds": "5",
    "relay.greeting_timeout_seconds": "1",
    "relay.command_timeout_seconds": "1",
    "status.listen": "off",
}
OFFERS = (*EXTENSIONS, "DSN")

Talk = Callable[[Script], tuple[Product, ScriptedServer, int]]


@pytest.fixture(scope="module")
def relays(
    redis_server: RedisServer, certificate: Certificate, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Talk]:
    """Call it for the relay and the primary that a script wants; scripts of one group, one after the other, share them.

    Those of the group before end: an idle relay costs something, too, and there are some fifty.
    """
    running: dict[tuple[object, ...], tuple[Product, ScriptedServer, int]] = {}
    users = tmp_path_factory.mktemp("users") / "users"
    users.write_text(f"ann:{hash_password('correct horse')}\n")
    with ExitStack() as ends:

        def of(script: Script) -> tuple[Product, ScriptedServer, int]:
            if script.group not in running:
                ends.close()
                running.clear()
                tls_port = free_port()
                names = {"certificate": certificate.certificate, "key": certificate.key, "users": users}
                names["tls_port"] = Path(str(tls_port))
                settings = {key: value.format(**names) for key, value in script.settings.items()}
                primary = ScriptedServer(extensions=OFFERS if script.offers is None else script.offers).start()
                ends.callback(primary.stop)
                product = Product(
                    tmp_path_factory.mktemp("relay"),
                    command="relay",
                    primary=primary.address,
                    redis_url=redis_server.url,
                    settings={**QUICK, **settings},
                )
                ends.callback(product.clean_up)
                product.start(wait=False)
                running[script.group] = (product, primary, tls_port)
            return running[script.group]

        yield of


def test_there_are_enough() -> None:
    """At least 120 conversations, and each names what it is about."""
    assert len(SCRIPTS) >= 120
    assert not [s.path.name for s in SCRIPTS if not re.match(r" (RFC \d+ |Postfix (X\w+_README|smtpd))", s.promise)]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.path.stem)
def test_dialogue(script: Script, relays: Talk, certificate: Certificate) -> None:
    """The relay says what the file says, and the primary hears what the file says."""
    product, primary, tls_port = relays(script)
    product.wait_for_log("listening")
    primary.drop()
    primary.replies, primary.in_data = script.replies, script.in_data
    first = len(primary.connections)
    port = tls_port if "smtp.listen_tls" in script.settings else product.smtp_port
    speak(
        script,
        lambda: Dialogue(port, greeting=None),
        lambda: primary.connections[first:],
        certificate.client_context(),
    )
    assert "session error" not in product.log
