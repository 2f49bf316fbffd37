"""An older smtp-dup's state folder: made once by that code, kept under tests/old_state, opened by ours.

To make the state of a commit (``git archive COMMIT | tar -x -C OLD``), with the environment of the tests:

    PYTHONPATH=OLD python tests/support/old_state.py tests/old_state/COMMIT-plain.tar.gz
    PYTHONPATH=OLD python tests/support/old_state.py --sealed tests/old_state/COMMIT-sealed.tar.gz

It runs that code's `smtp-dup up` between two servers, with mail of every kind that can be waiting, cuts its power, and
packs the state folder, with ``expected.json``: what was accepted and is still owed, by kind, subject and recipients.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import signal
import tarfile
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from relay.mail import encryption
from support.product import Product
from support.reactions import Close
from support.scripted_server import ScriptedServer
from support.waiting import free_port, wait_until

SETTINGS_FILE = '[[backup]]\nname = "new"\nurl = "{}"\n'
KINDS = ("pending", "deferred", "failed", "uncertain", "spooled")


@dataclass(frozen=True)
class Owed:
    """A message, or what is still owed of it, and the digest of what its client sent."""

    kind: str
    subject: str
    recipients: list[str]
    digest: str


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Site:
    """The old product between its servers; ``owed`` grows with each message."""

    def __init__(self, folder: Path, *, sealed: bool) -> None:
        self.primary, self.backup = ScriptedServer().start(), ScriptedServer(port=free_port()).start()
        settings = {"relay.uncertain_hold": "60", "redis.timeout_seconds": "1", "retry.first": "1h"}
        self.product = Product(
            folder,
            primary=self.primary.address,
            settings=settings,
            files={"settings.toml": SETTINGS_FILE.format(self.backup.address)},
        )
        if sealed:
            self.product.state_dir.mkdir()
            encryption.add_key(self.product.state_dir / "keys")
            self.product.settings["storage.key_file"] = str(self.product.state_dir / "keys")
        self.owed: list[Owed] = []

    def send(
        self, kind: str, *recipients: str, body: bytes = b"text\r\n", owed: list[str] | None = None, end: int = 250
    ) -> None:
        subject = f"{kind} {len(self.owed)}"
        data = b"Subject: %s\r\nX-Folded: a\r\n\tb \r\n\r\n%s" % (subject.encode(), body)
        self.owed.append(Owed(kind, subject, owed or list(recipients), digest(data)))
        with self.product.dialogue() as client:
            client.hello()
            client.mail("sender@example.com", *recipients, data=data, end=end)

    def fill(self) -> None:
        """Have mail of every kind waiting, in the order in which one does not disturb the other."""
        product = self.product.start()
        self.backup.replies |= {"RCPT TO:<later@": "451 4.2.0 later", "RCPT TO:<never@": "550 5.1.1 unknown"}
        self.send("deferred", "later@example.com")
        self.send("deferred", "now@example.com", "later@example.com", owed=["later@example.com"])
        self.send("failed", "never@example.com", body=b".dot\r\n" * 20)
        self.send("failed", "now@example.com", "never@example.com", owed=["never@example.com"])
        wait_until(lambda: len([e for e in product.events if e["event"] in {"deferred", "failed"}]) == 4)
        wait_until(lambda: product.summary("new")["failed"] == 2)
        self.backup.stop()
        for n in range(3):
            self.send("pending", f"p{n}@example.com", "q@example.com")
        self.send("pending", "large@example.com", body=b"a long line of a large message\r\n" * 20_000)
        self.send("pending", "eight@example.com", body="grüße\r\n".encode() + b"\xff\r\n")
        self.primary.replies["."] = Close()
        self.send("uncertain", "u@example.com", "v@example.com", end=451)
        self.primary.replies.clear()
        wait_until(lambda: product.summary("new")["pending"] == 7)
        (redis,) = product.children("valkey-server|redis-server")
        redis.signal(signal.SIGSTOP)
        for n in range(3):
            self.send("spooled", f"s{n}@example.com")
        product.kill()
        self.primary.stop()


def unpack(archive: Path, folder: Path) -> list[Owed]:
    """Unpack a state folder; returns what is owed."""
    folder.mkdir(parents=True)
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    expected = folder / "expected.json"
    owed = [Owed(**row) for row in json.loads(expected.read_text("utf-8"))]
    expected.unlink()
    return owed


def _pack(site: Site, archive: Path) -> None:
    text = json.dumps([asdict(owed) for owed in site.owed], indent=1).encode()
    with tarfile.open(archive, "w:gz") as packed:
        for path in sorted(site.product.state_dir.rglob("*")):
            if path.is_dir() or path.is_file():
                packed.add(path, path.relative_to(site.product.state_dir), recursive=False)
        entry = tarfile.TarInfo("expected.json")
        entry.size = len(text)
        packed.addfile(entry, io.BytesIO(text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("archive", type=Path)
    parser.add_argument("--sealed", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="smtp-dup-old-") as folder:
        site = Site(Path(folder) / "old", sealed=given.sealed)
        try:
            site.fill()
            _pack(site, given.archive)
        finally:
            site.product.clean_up()


if __name__ == "__main__":
    main()
