"""Exim as a competitor: an ``unseen`` router sends the copy, the next one the message. Only where it is installed.

It runs as root or as whoever calls us, in a folder of its own; ``EXIM`` names a program that is not in PATH.
"""

from __future__ import annotations

import os
import shutil
import smtplib
import subprocess
from contextlib import ExitStack
from pathlib import Path

from support.child_processes import Daemon
from support.waiting import free_port, wait_until

_CONFIGURATION = """
exim_path = {program}
exim_user = {user}
exim_group = {group}
never_users =
spool_directory = {folder}/spool
log_file_path = {folder}/log/%slog
pid_file_path = {folder}/exim.pid
primary_hostname = mx.example.net
local_interfaces = 127.0.0.1
daemon_smtp_ports = {port}
tls_advertise_hosts =
host_lookup =
rfc1413_hosts =
message_size_limit = 0
smtp_accept_max = 0
smtp_accept_queue_per_connection = 0
acl_smtp_rcpt = accept
keep_environment =

begin routers
copy:
  driver = manualroute
  route_data = 127.0.0.1
  self = send
  transport = to_backup
  unseen
primary:
  driver = manualroute
  route_data = 127.0.0.1
  self = send
  transport = to_primary

begin transports
to_primary:
  driver = smtp
  allow_localhost
  port = {primary}
to_backup:
  driver = smtp
  allow_localhost
  port = {backup}

begin retry
* * F,1h,1s
"""


def program() -> str | None:
    """Find Exim."""
    return os.environ.get("EXIM") or next(
        (p for n in ("exim4", "exim") for p in (shutil.which(n), shutil.which(n, path="/usr/sbin")) if p), None
    )


def start(stack: ExitStack, folder: Path, primary: int, backup: int) -> int:
    """Start a daemon that delivers at once and runs its queue every second; return its port."""
    found = program()
    assert found is not None
    port = free_port()
    user, group = ("nobody", "nogroup") if os.geteuid() == 0 else (str(os.geteuid()), str(os.getegid()))
    for name in ("", "spool", "log"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        if os.geteuid() == 0:
            shutil.chown(folder / name, user, group)
    folder.parent.chmod(0o755)
    configuration = folder / "exim.conf"
    configuration.write_text(
        _CONFIGURATION.format(
            program=found, user=user, group=group, folder=folder, port=port, primary=primary, backup=backup
        )
    )
    log = (folder / "log" / "stderr").open("ab")
    stack.callback(log.close)
    process = subprocess.Popen(
        [found, "-C", str(configuration), "-bdf", "-q1s"],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    # Its deliveries are processes of their own, in its session and process group.
    stack.callback(Daemon(process, folder).stop, group=True)
    wait_until(lambda: _greets(process, port, folder), message=lambda: _log(folder))
    return port


def _greets(process: subprocess.Popen[bytes], port: int, folder: Path) -> bool:
    assert process.poll() is None, f"Exim ended: {_log(folder)}"
    try:
        with smtplib.SMTP("127.0.0.1", port, timeout=5) as client:
            return bool(client.noop()[0] == 250)
    except OSError:
        return False


def _log(folder: Path) -> str:
    return "\n".join(path.read_text("utf-8", "replace")[-1000:] for path in (folder / "log").iterdir())
