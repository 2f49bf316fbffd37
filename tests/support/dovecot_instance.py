"""A private Dovecot as an LMTP server: mail for anybody, or for the users named, a Maildir for each.

Dovecot 2.3 from Debian's dovecot-lmtpd, which needs root; it runs in a folder of its own on a free loopback port, and
ends with the test run.
"""

from __future__ import annotations

import grp
import mailbox
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Self

from support.child_processes import Daemon
from support.dialogue import Dialogue, Unexpected
from support.waiting import free_port, wait_until

# Debian leaves it out of the PATH of an ordinary user.
_PROGRAM = shutil.which("dovecot") or shutil.which("dovecot", path="/usr/sbin")
_CONFIGURATION = """
base_dir = {directory}/run
state_dir = {directory}/state
instance_name = {directory.name}
log_path = {directory}/log/dovecot.log
protocols = lmtp
listen = 127.0.0.1
hostname = dovecot.example.net
ssl = {ssl}
{certificate}
mail_location = maildir:{directory}/mail/%u
mail_plugins = quota
first_valid_uid = 1
recipient_delimiter =
lmtp_save_to_detail_mailbox = no
lmtp_rawlog_dir = {directory}/said
passdb {{
  driver = static
  args = nopassword=y
}}
{userdb}
plugin {{
  quota = maildir:all
}}
service lmtp {{
  inet_listener lmtp {{
    address = 127.0.0.1
    port = {port}
  }}
}}
service stats {{
  unix_listener stats-writer {{
    mode = 0666
  }}
}}
"""
_ANYBODY = """
userdb {{
  driver = static
  args = uid={uid} gid={gid} home={directory}/mail/%u allow_all_users=yes
}}
"""
_LISTED = """
userdb {{
  driver = passwd-file
  args = username_format=%u {directory}/users
}}
"""


def unavailable() -> str:
    """Say why a private Dovecot cannot be run here; "" when it can."""
    if os.geteuid() != 0:
        return "needs root to start a private Dovecot"
    if _PROGRAM is None or not Path("/usr/lib/dovecot/lmtp").exists():
        return "needs Debian's dovecot-lmtpd package"
    version = subprocess.run([_PROGRAM, "--version"], capture_output=True, text=True, check=True).stdout
    return "" if version.startswith("2.3.") else f"needs Dovecot 2.3, this is {version.strip()}"


class DovecotInstance:
    """One Dovecot. ``users`` are the addresses that it knows (default: all), ``full`` those of them with no room."""

    def __init__(
        self,
        users: Iterable[str] | None = None,
        full: Iterable[str] = (),
        *,
        certificate: Path | None = None,
        key: Path | None = None,
    ) -> None:
        self.host = "127.0.0.1"
        self.port = free_port()
        # Not below pytest's folder: its processes run as users of their own, and must be able to enter.
        self.directory = Path(tempfile.mkdtemp(prefix="smtp-dup-dovecot-"))
        self.directory.chmod(0o755)
        self._daemon: Daemon | None = None
        self._owner = pwd.getpwnam("nobody").pw_uid, grp.getgrnam("nogroup").gr_gid
        for name in ("run", "state", "log", "mail", "said"):
            (self.directory / name).mkdir()
        for name in ("mail", "said"):
            os.chown(self.directory / name, *self._owner)
        uid, gid = self._owner
        userdb = _ANYBODY if users is None else _LISTED
        self.know(users or (), full)
        (self.directory / "dovecot.conf").write_text(
            _CONFIGURATION.format(
                directory=self.directory,
                port=self.port,
                ssl="no" if certificate is None else "yes",
                certificate="" if certificate is None else f"ssl_cert = <{certificate}\nssl_key = <{key}",
                userdb=userdb.format(uid=uid, gid=gid, directory=self.directory),
            )
        )

    def know(self, users: Iterable[str], full: Iterable[str] = ()) -> None:
        """Change who has a mailbox, and who has no room in it."""
        uid, gid = self._owner
        full = set(full)
        lines = [
            f"{user}::{uid}:{gid}::{self.directory}/mail/{user}::"
            + ("userdb_quota_rule=*:bytes=10" if user in full else "")
            for user in users
        ]
        (self.directory / "users").write_text("".join(f"{line}\n" for line in lines))
        for limits in (self.directory / "mail").glob("*/maildirsize"):
            limits.unlink()  # it holds the quota of before

    def start(self) -> Self:
        """Start it and wait until it greets."""
        assert _PROGRAM is not None
        with (self.directory / "log" / "output").open("ab") as output:
            process = subprocess.Popen(
                [_PROGRAM, "-F", "-c", str(self.directory / "dovecot.conf")],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                process_group=0,
            )
        self._daemon = Daemon(process, self.directory)
        wait_until(self._greets, message=lambda: f"Dovecot does not greet: {self.log}")
        return self

    def stop(self) -> None:
        """Stop it; its mailbox stays."""
        if self._daemon is not None:
            self._daemon.stop()
            self._daemon = None

    def remove(self) -> None:
        """Stop it and delete its folder."""
        self.stop()
        shutil.rmtree(self.directory, ignore_errors=True)

    @property
    def address(self) -> str:
        return f"lmtp://{self.host}:{self.port}"

    @property
    def log(self) -> str:
        return "\n".join(path.read_text("utf-8", "replace") for path in sorted((self.directory / "log").iterdir()))

    @property
    def said(self) -> list[bytes]:
        """What clients have said, for each connection."""
        return [path.read_bytes() for path in sorted((self.directory / "said").glob("*.in"))]

    def maildir_messages(self) -> list[bytes]:
        """Return what has arrived, as stored, with an Envelope-To line on top.

        Dovecot's own Delivered-To is missing where there are several recipients.
        """
        found = []
        for folder in (self.directory / "mail").iterdir():
            box = mailbox.Maildir(folder, create=False)
            label = b"Envelope-To: " + os.fsencode(folder.name) + b"\n"
            found += [label + box.get_bytes(key) for key in box.keys()]  # noqa: SIM118  (it iterates over messages)
        return found

    def wait_for(self, count: int, timeout: float = 60) -> list[bytes]:
        """Wait until so many messages are in the Maildirs, and return them."""
        wait_until(
            lambda: sum(1 for _ in (self.directory / "mail").glob("*/new/*")) >= count,
            timeout,
            lambda: f"{len(self.maildir_messages())} of {count} messages came\n{self.log[-2000:]}",
        )
        return self.maildir_messages()

    def _greets(self) -> bool:
        assert self._daemon is not None
        assert self._daemon.runs, f"Dovecot ended: {self.log}"
        try:
            with Dialogue(self.port, timeout=5) as client:
                client.quit()
        except (OSError, Unexpected):
            return False
        return True
