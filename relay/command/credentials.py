"""`hash-password` and `new-key`: what the settings' files of secrets are made with."""

from __future__ import annotations

import getpass
import sys
from pathlib import Path

from relay.command.exit_status import WELL, Trouble
from relay.mail import encryption
from relay.mail.text import printable
from relay.smtpd.passwords import hash_password as hashed


def hash_password() -> int:
    """Read a password, twice from a terminal, and write its hash."""
    try:
        password = getpass.getpass("Password: ") if sys.stdin.isatty() else sys.stdin.readline().rstrip("\r\n")
        if sys.stdin.isatty() and password != getpass.getpass("Again: "):
            raise Trouble("the two differ")
    except EOFError:
        password = ""
    if not password:
        raise Trouble("no password was given")
    sys.stdout.write(hashed(password) + "\n")
    return WELL


def new_key(file: str | None) -> int:
    """Write a new key to a file, in front of those in it, or to standard output."""
    if file is None:
        sys.stdout.write(encryption.new_key() + "\n")
        return WELL
    try:
        ids = encryption.add_key(Path(file))
    except encryption.BadKeyFile as error:
        raise Trouble(str(error)) from error
    sys.stdout.write(f"key {ids[0]} seals from the next start or SIGHUP; {len(ids)} in {printable(file)}\n")
    return WELL
