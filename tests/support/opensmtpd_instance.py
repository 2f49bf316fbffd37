"""A private OpenSMTPD at its defaults, run from an unpacked Debian package: it cannot be installed beside Postfix.

It takes everything and relays it to one server. Its users exist only in a mount namespace, as Exim's do.
"""

from __future__ import annotations

import os
import shutil
import smtplib
import subprocess
import tempfile
from pathlib import Path
from typing import Self

from support import debian
from support.child_processes import Daemon
from support.waiting import free_port, wait_until

PACKAGES = ("opensmtpd", "libevent-2.1-7")
_USERS = {"opensmtpd": 58_998, "opensmtpq": 58_997}  # of nobody else, in the namespace only
_CONFIGURATION = """
listen on 127.0.0.1 port {port}
action "out" relay host "smtp://{target}"
match from any for any action "out"
"""
# What it has compiled in, on file systems of its own.
_RUN = """
for name in passwd group ld.so.cache; do mount --bind "$1/$name" "/etc/$name" || exit; done
for folder in /var/spool /var/lib /run; do mount -t tmpfs -o mode=0755 none $folder || exit; done
mkdir -p -m 711 /var/spool/smtpd && mkdir -p /var/lib/opensmtpd/empty || exit
shift; exec "$@"
"""


def unpack(folder: Path) -> tuple[Path | None, str]:
    """Return the program, unpacked below ``folder``, or None and why there is none."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        return None, "OpenSMTPD needs root and the unshare program"
    if subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode:
        return None, "OpenSMTPD needs a mount namespace, which is not allowed here"
    folder.chmod(0o755)
    try:
        debian.unpack(folder, *PACKAGES)
    except debian.NotThere as error:
        return None, f"OpenSMTPD's packages cannot be had: {error}"
    return folder / "usr" / "sbin" / "smtpd", ""


class OpenSmtpdInstance:
    """One OpenSMTPD on a loopback port that relays all that it accepts to ``target``, host:port."""

    def __init__(self, program: Path, target: str) -> None:
        self.host = "127.0.0.1"
        self.port = free_port()
        self.directory = Path(tempfile.mkdtemp(prefix="smtp-dup-opensmtpd-"))
        self.directory.chmod(0o755)
        self._program = program
        self._daemon: Daemon | None = None
        (self.directory / "smtpd.conf").write_text(_CONFIGURATION.format(port=self.port, target=target))
        users = "".join(f"{name}:x:{number}:{number}::/nonexistent:/bin/false\n" for name, number in _USERS.items())
        groups = "".join(f"{name}:x:{number}:\n" for name, number in _USERS.items())
        (self.directory / "passwd").write_text(Path("/etc/passwd").read_text() + users)
        (self.directory / "group").write_text(Path("/etc/group").read_text() + groups)
        libraries = [str(path) for path in (program.parent.parent / "lib").glob("*-linux-gnu")]
        subprocess.run(["/sbin/ldconfig", "-X", "-C", str(self.directory / "ld.so.cache"), *libraries], check=True)

    def start(self) -> Self:
        """Start it and wait until it greets."""
        with (self.directory / "output").open("ab") as output:
            process = subprocess.Popen(
                [
                    *("unshare", "-m", "--propagation", "private", "sh", "-c", _RUN, "sh", str(self.directory)),
                    *(str(self._program), "-d", "-f", str(self.directory / "smtpd.conf")),
                ],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                process_group=0,
            )
        self._daemon = Daemon(process, self.directory)
        wait_until(self._greets, message=lambda: f"OpenSMTPD does not greet: {self.log}")
        return self

    def remove(self) -> None:
        """Stop it and delete its folder."""
        if self._daemon is not None:
            self._daemon.stop(group=True)
            self._daemon = None
        shutil.rmtree(self.directory, ignore_errors=True)

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def log(self) -> str:
        return (self.directory / "output").read_text("utf-8", "replace")

    def _greets(self) -> bool:
        assert self._daemon is not None
        assert self._daemon.runs, f"OpenSMTPD ended: {self.log}"
        try:
            with smtplib.SMTP(self.host, self.port, timeout=5) as client:
                return client.noop()[0] == 250
        except OSError:
            return False
