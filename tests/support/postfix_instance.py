"""Private Postfix instances: a front that feeds the relay, a store that keeps what it gets, a bcc competitor.

An instance is one folder with its own configuration, queue and log; it needs Debian's postfix package and root,
and ends with the test run whatever happens. Tests that use one carry the marker ``postfix``.
"""

from __future__ import annotations

import grp
import mailbox
import os
import pwd
import shutil
import smtplib
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from support.child_processes import Daemon
from support.waiting import PATIENCE, free_port, wait_until

_SERVICES = """
127.0.0.1:{port} inet n - n - - smtpd
pickup    unix  n - n 60    1 pickup
cleanup   unix  n - n -     0 cleanup
qmgr      unix  n - n 300   1 qmgr
tlsmgr    unix  - - n 1000? 1 tlsmgr
rewrite   unix  - - n -     - trivial-rewrite
bounce    unix  - - n -     0 bounce
defer     unix  - - n -     0 bounce
trace     unix  - - n -     0 bounce
verify    unix  - - n -     1 verify
flush     unix  n - n 1000? 0 flush
proxymap  unix  - - n -     - proxymap
smtp      unix  - - n -     - smtp
relay     unix  - - n -     - smtp
showq     unix  n - n -     - showq
error     unix  - - n -     - error
retry     unix  - - n -     - error
discard   unix  - - n -     - discard
virtual   unix  - n n -     - virtual
lmtp      unix  - - n -     - lmtp
anvil     unix  - - n -     1 anvil
scache    unix  - - n -     1 scache
postlog   unix-dgram n - n - 1 postlogd
"""
_QUEUE = {
    **dict.fromkeys(("active", "bounce", "corrupt", "defer", "deferred", "flush", "hold", "incoming"), 0o700),
    "private": 0o700,
    "saved": 0o700,
    "trace": 0o700,
    "maildrop": 0o730,
    "public": 0o710,
}


def unavailable() -> str:
    """Say why private Postfix instances cannot be run here; "" when they can."""
    if os.geteuid() != 0:
        return "needs root to start a private Postfix"
    if shutil.which("postfix") is None:
        return "needs Debian's postfix package"
    return ""


class PostfixInstance:
    """One Postfix on a loopback port, configured by ``front``, ``store`` or ``bcc``, plus any main.cf settings."""

    def __init__(self, settings: Mapping[str, str] | None = None, *, port: int = 0, name: str = "postfix") -> None:
        self.host = "127.0.0.1"
        self.port = port or free_port()
        # Not below pytest's folder: daemons that run as postfix and nobody must be able to enter.
        self.directory = Path(tempfile.mkdtemp(prefix=f"smtp-dup-{name}-"))
        self.directory.chmod(0o755)
        self.log_file = self.directory / "log" / "mail.log"
        self.mailboxes = self.directory / "mail"
        self._daemon: Daemon | None = None
        self._configure(settings or {})

    @classmethod
    def front(cls, relay_port: int, domains: tuple[str, ...] = ("*",), **settings: str) -> Self:
        """Make an MTA that sends mail for these domains (default: all) to a relay on loopback."""
        routes = " ".join(f"{{{domain} = smtp:[127.0.0.1]:{relay_port}}}" for domain in domains)
        return cls(
            {
                "transport_maps": f"inline:{{ {routes} }}",
                "smtp_send_xforward_command": "yes",
                **settings,
            },
            name="front",
        )

    @classmethod
    def store(cls, domains: tuple[str, ...] = ("example.com",), **settings: str) -> Self:
        """Make a mail server that puts what it gets for these domains into one Maildir, unchanged."""
        nobody = pwd.getpwnam("nobody")
        return cls(
            {
                "virtual_mailbox_domains": " ".join(domains),
                "virtual_mailbox_base": "$mailboxes",
                "virtual_mailbox_maps": "static:all/",
                "virtual_uid_maps": f"static:{nobody.pw_uid}",
                "virtual_gid_maps": f"static:{nobody.pw_gid}",
                "virtual_minimum_uid": "1",
                "smtpd_authorized_xforward_hosts": "127.0.0.0/8",
                "smtpd_authorized_xclient_hosts": "127.0.0.0/8",
                **settings,
            },
            name="store",
        )

    @classmethod
    def bcc(cls, primary_port: int, backup_port: int, address: str = "b@example.com", **settings: str) -> Self:
        """Make the competitor: Postfix sending to one server, and its own bcc copy to another."""
        domain = address.rpartition("@")[2]
        return cls(
            {
                "recipient_bcc_maps": f"inline:{{ {{{address} = b@copy.test}} }}",
                "transport_maps": f"inline:{{ {{{domain} = smtp:[127.0.0.1]:{primary_port}}} "
                f"{{copy.test = relay:[127.0.0.1]:{backup_port}}} }}",
                **settings,
            },
            name="bcc",
        )

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.remove()

    def start(self) -> Self:
        """Start it and wait until it greets."""
        # Not by `postfix start`: it checks for two seconds, and its master outlives us.
        master = subprocess.run(
            ["postconf", "-c", self._etc, "-h", "daemon_directory"], check=True, capture_output=True, text=True
        )
        with self.log_file.open("ab") as log:
            process = subprocess.Popen(
                [f"{master.stdout.strip()}/master", "-s", "-c", self._etc],
                env={**os.environ, "MAIL_CONFIG": self._etc, "MAIL_LOGTAG": "postfix"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # it kills its whole group when it ends
            )
        self._daemon = Daemon(process, self.directory)
        wait_until(self._greets, message=lambda: f"Postfix does not greet: {self.log}")
        return self

    def stop(self) -> None:
        """Stop it; queue and mailboxes stay, and ``start`` goes on with them."""
        if self._daemon is not None:
            self._daemon.stop()
            self._daemon = None

    def remove(self) -> None:
        """Stop it and delete its folder."""
        self.stop()
        shutil.rmtree(self.directory, ignore_errors=True)

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def log(self) -> str:
        return self.log_file.read_text("utf-8", "replace") if self.log_file.exists() else ""

    def submit(
        self, sender: str, recipients: list[str], message: bytes, options: tuple[str, ...] = ("BODY=8BITMIME",)
    ) -> None:
        """Hand a message in over SMTP; fails the test when anything is refused."""
        with smtplib.SMTP(self.host, self.port, timeout=PATIENCE) as client:
            refused = client.sendmail(sender, recipients, message, mail_options=options)
        assert not refused, refused

    def maildir_messages(self) -> list[bytes]:
        """Return what has arrived, as stored: trace lines on top, LF line ends."""
        directory = self.mailboxes / "all"
        if not (directory / "new").is_dir():
            return []
        box = mailbox.Maildir(directory, create=False)
        return [box.get_bytes(key) for key in box.keys()]  # noqa: SIM118  (a Maildir iterates over messages)

    def wait_for(self, count: int, timeout: float = 60) -> list[bytes]:
        """Wait until so many messages are in the Maildir, and return them."""
        new = self.mailboxes / "all" / "new"
        wait_until(
            lambda: new.is_dir() and sum(1 for _ in new.iterdir()) >= count,
            timeout,
            lambda: f"{len(self.maildir_messages())} of {count} messages came\n{self.log[-2000:]}",
        )
        return self.maildir_messages()

    def queued(self) -> list[str]:
        """Return the ids of the messages that are still in the queue."""
        queue = self.directory / "queue"
        folders = ("maildrop", "incoming", "active", "deferred", "hold", "corrupt")
        return [path.name for folder in folders for path in (queue / folder).rglob("*") if path.is_file()]

    def queue_empty(self) -> bool:
        return not self.queued()

    def flush(self) -> None:
        """Try everything that is deferred now."""
        self._run("postfix", "-c", self._etc, "flush")

    @property
    def _etc(self) -> str:
        return str(self.directory / "etc")

    def _greets(self) -> bool:
        assert self._daemon is not None
        assert self._daemon.runs, f"Postfix ended: {self.log}"
        try:
            with smtplib.SMTP(self.host, self.port, timeout=5) as client:
                return client.noop()[0] == 250
        except OSError:
            return False

    def _run(self, *command: str) -> None:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
        assert done.returncode == 0, f"{command}: {done.stderr}{self.log}"

    def _configure(self, settings: Mapping[str, str]) -> None:
        for name in ("etc", "queue", "data", "log", "mail", "queue/pid"):
            (self.directory / name).mkdir(mode=0o755)
        postfix, nobody = pwd.getpwnam("postfix"), pwd.getpwnam("nobody")
        for name, mode in _QUEUE.items():
            (self.directory / "queue" / name).mkdir()
            (self.directory / "queue" / name).chmod(mode)
            os.chown(self.directory / "queue" / name, postfix.pw_uid, -1)
        for name in ("public", "maildrop"):
            os.chown(self.directory / "queue" / name, -1, grp.getgrnam("postdrop").gr_gid)
        os.chown(self.directory / "data", postfix.pw_uid, postfix.pw_gid)
        os.chown(self.mailboxes, nobody.pw_uid, nobody.pw_gid)
        main = {
            "compatibility_level": "3.6",
            "queue_directory": str(self.directory / "queue"),
            "data_directory": str(self.directory / "data"),
            "mailboxes": str(self.mailboxes),
            "maillog_file": str(self.log_file),
            "maillog_file_prefixes": str(self.directory),
            "inet_interfaces": "127.0.0.1",
            "inet_protocols": "ipv4",
            "myhostname": "mx.example.net",
            "mydestination": "",
            "alias_maps": "",
            "alias_database": "",
            "local_recipient_maps": "",
            "mynetworks": "127.0.0.0/8",
            "smtpd_relay_restrictions": "permit_mynetworks, reject",
            "smtpd_peername_lookup": "no",
            "smtp_dns_support_level": "disabled",
            "smtp_host_lookup": "native",
            # Bytes are compared: nothing may be added, folded or converted on the way.
            "local_header_rewrite_clients": "",
            "disable_mime_output_conversion": "yes",
            "smtp_line_length_limit": "0",
            "line_length_limit": "1048576",
            "smtputf8_enable": "yes",
            "message_size_limit": "104857600",
            "mailbox_size_limit": "0",
            "virtual_mailbox_limit": "0",
            # Loopback clients under load are no abuse, and a test does not wait five minutes for a retry.
            "smtpd_client_connection_count_limit": "0",
            "smtpd_client_event_limit_exceptions": "127.0.0.0/8",
            "smtpd_error_sleep_time": "0",
            "minimal_backoff_time": "2s",
            "maximal_backoff_time": "5s",
            "queue_run_delay": "2s",
            **settings,
        }
        etc = Path(self._etc)
        (etc / "main.cf").write_text("".join(f"{name} = {value}\n" for name, value in main.items()))
        (etc / "master.cf").write_text(_SERVICES.format(port=self.port))
        # Postfix waits up to two seconds for a file that was written just now: it may still be changing.
        long_ago = time.time() - 60
        os.utime(etc / "main.cf", (long_ago, long_ago))
