"""A private Exim as a mail store, run from unpacked Debian packages: its package cannot be installed beside Postfix.

``unpack`` gets them into a folder and says why where it cannot. The program insists on its own user in
/etc/passwd, so it runs in a mount namespace that has one. It ends with the test run.
"""

from __future__ import annotations

import mailbox
import os
import shutil
import smtplib
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Self

from support import debian
from support.child_processes import Daemon
from support.waiting import PATIENCE, free_port, wait_until

_PACKAGES = ("exim4-daemon-light", "libidn12", "libgnutls-dane0", "libnsl2")
_USER = 58_999  # of nobody else, in the namespace only
_CONFIGURATION = """
primary_hostname = exim.example.net
local_interfaces = 127.0.0.1
daemon_smtp_ports = {port}
spool_directory = {directory}/spool
log_file_path = {directory}/log/%slog
pid_file_path = {directory}/exim.pid
exim_path = {program}
domainlist ours = {domains}
acl_smtp_rcpt = recipient
acl_smtp_predata = before_content
acl_smtp_data = content
accept_8bitmime = true
allow_utf8_domains = true
smtputf8_advertise_hosts = *
dsn_advertise_hosts = *
chunking_advertise_hosts = *
message_size_limit = 100M
header_maxsize = 2M
header_line_maxsize = 0
received_headers_max = 100
recipients_max = 1000
smtp_accept_max = 200
{limits}
keep_environment =
host_lookup =
rfc1413_query_timeout = 0s
return_path_remove = false
envelope_to_remove = false
delivery_date_remove = false
tls_advertise_hosts =
begin acl
recipient:
  deny message = unknown here
       domains = ! +ours
{refusals}
  accept
before_content:
{before_content}
  accept
content:
{content}
  accept
begin routers
all:
  driver = accept
  transport = box
begin transports
box:
  driver = appendfile
  directory = {directory}/mail
  maildir_format
  create_directory
  user = {user}
  group = {user}
  return_path_add
  envelope_to_add
begin retry
* * F,1h,1m
"""
_NO_LIMITS = "smtp_accept_queue_per_connection = 0\nsmtp_accept_max_per_connection = 0"
# Its user and its libraries exist only below this shell. Not by LD_LIBRARY_PATH: the program is setuid and ignores it.
_RUN = 'for name in passwd group ld.so.cache; do mount --bind "$1/$name" "/etc/$name" || exit; done; shift; exec "$@"'


def unpack(folder: Path) -> tuple[Path | None, str]:
    """Return the program, unpacked below ``folder``, or None and why there is none."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        return None, "Exim needs root and the unshare program"
    if subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode:
        return None, "Exim needs a mount namespace, which is not allowed here"
    folder.chmod(0o755)
    try:
        debian.unpack(folder, *_PACKAGES)
    except debian.NotThere as error:
        return None, f"Exim's packages cannot be had: {error}"
    return folder / "usr" / "sbin" / "exim4", ""


class EximInstance:
    """One Exim on a loopback port that puts mail for ``domains`` into one Maildir, but for ``refused`` local parts."""

    def __init__(
        self,
        program: Path,
        domains: Iterable[str] = ("example.com",),
        *,
        refused: Iterable[str] = (),
        session_limits: bool = True,
        before_content: Iterable[str] = (),
        content: Iterable[str] = (),
    ) -> None:
        """``before_content`` and ``content`` are lines of the ACLs at DATA and at its end.

        Without ``session_limits`` set (to none) it has its own defaults for what a connection may carry.
        """
        self.host = "127.0.0.1"
        self.port = free_port()
        self.directory = Path(tempfile.mkdtemp(prefix="smtp-dup-exim-"))
        self.directory.chmod(0o755)
        self._program = program
        self._domains = " : ".join(domains)
        self._before_content, self._content = "\n".join(before_content), "\n".join(content)
        self._limits = _NO_LIMITS if session_limits else ""
        self._daemon: Daemon | None = None
        for name in ("spool", "log", "mail"):
            (self.directory / name).mkdir()
            os.chown(self.directory / name, _USER, _USER)
        for name, line in (
            ("passwd", f"Debian-exim:x:{_USER}:{_USER}::/:/bin/false"),
            ("group", f"Debian-exim:x:{_USER}:"),
        ):
            (self.directory / name).write_text(Path("/etc", name).read_text() + line + "\n")
        libraries = [str(path) for path in (program.parent.parent / "lib").glob("*-linux-gnu")]
        subprocess.run(["/sbin/ldconfig", "-X", "-C", str(self.directory / "ld.so.cache"), *libraries], check=True)
        self.configure(refused)

    def configure(self, refused: Iterable[str] = ()) -> None:
        """Refuse these local parts from now on."""
        running = self._daemon is not None
        self.stop()
        refusals = [f"  deny message = no such user\n       local_parts = {name}" for name in refused]
        text = _CONFIGURATION.format(
            port=self.port,
            directory=self.directory,
            program=self._program,
            domains=self._domains,
            user=_USER,
            limits=self._limits,
            before_content=self._before_content,
            content=self._content,
            refusals="\n".join(refusals),
        )
        (self.directory / "exim.conf").write_text(text)
        if running:
            self.start()

    def start(self) -> Self:
        """Start it and wait until it greets."""
        with (self.directory / "output").open("ab") as output:
            process = subprocess.Popen(
                [
                    *("unshare", "-m", "--propagation", "private", "sh", "-c", _RUN, "sh", str(self.directory)),
                    *(str(self._program), "-C", str(self.directory / "exim.conf"), "-bdf", "-q10s"),
                ],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                process_group=0,
            )
        self._daemon = Daemon(process, self.directory)
        wait_until(self._greets, message=lambda: f"Exim does not greet: {self.log}")
        return self

    def ask(self, *words: str) -> str:
        """Run the program with its configuration, as `exim -bt ADDRESS`; fails unless it ends with 0."""
        inside = ("unshare", "-m", "--propagation", "private", "sh", "-c", _RUN, "sh", str(self.directory))
        command = [*inside, str(self._program), "-C", str(self.directory / "exim.conf"), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=PATIENCE).stdout

    def stop(self) -> None:
        """Stop it; its mailbox stays."""
        if self._daemon is not None:
            # With those that serve a connection: they outlive the daemon, with the configuration of their start.
            self._daemon.stop(group=True)
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
        files = [self.directory / "output", *sorted((self.directory / "log").iterdir())]
        return "\n".join(path.read_text("utf-8", "replace") for path in files if path.exists())

    def maildir_messages(self) -> list[bytes]:
        """Return what has arrived, as stored: trace lines on top, LF line ends."""
        if not (self.directory / "mail" / "new").is_dir():
            return []
        box = mailbox.Maildir(self.directory / "mail", create=False)
        return [box.get_bytes(key) for key in box.keys()]  # noqa: SIM118  (a Maildir iterates over messages)

    def wait_for(self, count: int, timeout: float = 60) -> list[bytes]:
        """Wait until so many messages are in the Maildir, and return them."""
        new = self.directory / "mail" / "new"
        wait_until(
            lambda: new.is_dir() and sum(1 for _ in new.iterdir()) >= count,
            timeout,
            lambda: f"{len(self.maildir_messages())} of {count} messages came\n{self.log[-2000:]}",
        )
        return self.maildir_messages()

    def _greets(self) -> bool:
        assert self._daemon is not None
        assert self._daemon.runs, f"Exim ended: {self.log}"
        try:
            with smtplib.SMTP(self.host, self.port, timeout=5) as client:
                return client.noop()[0] == 250
        except OSError:
            return False
