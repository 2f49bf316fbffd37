#!/usr/bin/env python3
"""`nc -z HOST PORT`, for the health checks that GoSMTP-dup's documentation gives; of netcat nothing else."""

from __future__ import annotations

import socket
import sys

words = [word for word in sys.argv[1:] if not word.startswith("-")]
if "-z" not in sys.argv or len(words) != 2 or not words[1].isdecimal():
    sys.exit("this is not netcat: nc -z HOST PORT says whether somebody listens there, by its exit status")
try:
    socket.create_connection((words[0], int(words[1])), timeout=5).close()
except OSError as error:
    sys.exit(f"{words[0]} {words[1]}: {error}")
