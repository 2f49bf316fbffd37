"""Haraka as a competitor: a plugin adds a recipient for the copy, its own outbound queue does the rest.

Only where it is installed; ``HARAKA`` names a program that is not in PATH. It writes its queue to files, without
fsync.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from contextlib import ExitStack
from pathlib import Path

from bench import programs
from support.child_processes import tied
from support.waiting import free_port, wait_until

_PLUGIN = """
exports.hook_connect = (next, connection) => {{ connection.relaying = true; next(); }};
exports.hook_rcpt = (next) => next(OK);
exports.hook_data = (next, connection) => {{
  const recipients = connection.transaction.rcpt_to;
  recipients.push(new recipients[0].constructor('<b@copy.test>'));
  next();
}};
exports.hook_get_mx = (next, hmail, domain) =>
  next(OK, {{ priority: 0, exchange: '127.0.0.1', port: domain === 'copy.test' ? {backup} : {primary} }});
"""
# What is not here it would miss: an instance's files replace the program's own.
_CONNECTION = """
[headers]
[haproxy]
[max]
bytes=26214400
line_length=512
data_line_length=992
mime_parts=1000
[message]
greeting[]=Haraka
helo=Hello.
close=Bye.
[uuid]
banner_chars=6
"""
_FILES = {
    "config/connection.ini": _CONNECTION,
    "config/smtp.ini": "listen=127.0.0.1:{port}\nnodes=cpus\n",
    "config/outbound.ini": "always_split=true\nenable_tls=false\ninet_prefer=v4\n",
    "config/log.ini": "[main]\nlevel=error\nformat=default\n",
    "config/plugins": "copy\n",
    "config/me": "mx.example.net\n",
    "plugins/copy.js": _PLUGIN,
}


def program() -> str | None:
    """Find Haraka."""
    return os.environ.get("HARAKA") or shutil.which("haraka")


def start(stack: ExitStack, folder: Path, primary: int, backup: int) -> tuple[int, int]:
    """Start it; return its port and its process id."""
    found = program()
    assert found is not None
    port = free_port()
    for name, text in _FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.format(port=port, primary=primary, backup=backup) if "{" in text else text)
    (folder / "queue").mkdir()
    log = stack.enter_context((folder / "log").open("ab"))
    process = subprocess.Popen(
        tied([found, "-c", str(folder)]),
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    stack.callback(programs.stop, process)
    wait_until(lambda: programs.listens(process, port), message=lambda: (folder / "log").read_text()[-2000:])
    return port, process.pid
