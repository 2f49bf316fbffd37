"""The Redis that commands talk to: the one in the settings, or the embedded one of a running `smtp-dup up`.

One that is away or does not answer in time is a CannotSay, also when it goes away in the middle.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from redis import Redis
from redis.exceptions import AuthenticationError, BusyLoadingError
from redis.exceptions import ConnectionError as NoConnection
from redis.exceptions import TimeoutError as NoAnswer

from relay import log_lines, private_files
from relay.command.exit_status import CannotSay, Trouble
from relay.config.loader import Settings
from relay.mail import encryption
from relay.mail.record import bound
from relay.mail.text import printable
from relay.redisio import embedded
from relay.redisio.clients import sync_client
from relay.redisio.said import said

_PATIENCE = 30.0  # seconds for one answer, once it has answered at all: an operator can wait for a busy one


@contextmanager
def ledger_of(settings: Settings) -> Iterator[Redis]:
    """Connect to the Redis with the ledger, ready to read what is stored there. Raises CannotSay, Trouble."""
    log_lines.configure("warning")  # a command's words are its output
    private_files.trust(settings.state_dir)
    try:
        encryption.use(settings.storage.key_file)
        bound(settings.smtp.max_message_bytes)
    except encryption.BadKeyFile as error:
        raise Trouble(f"storage.key_file: {error}") from error
    server = settings.redis if settings.redis.url else settings.redis.at(embedded.url(settings.state_dir))
    try:
        with sync_client(server, server.timeout_seconds, retries=0) as first:
            first.time()  # not PING, which one that cannot save (MISCONF) refuses as it does writes
        with sync_client(server, max(_PATIENCE, server.timeout_seconds), retries=0) as connection:
            yield connection
    except (AuthenticationError, BusyLoadingError, NoAnswer) as error:
        raise CannotSay(f"Redis at {server.shown}: {printable(said(error))}") from error
    except NoConnection as error:
        if settings.redis.url:
            option = "redis.sentinels" if server.sentinels else "redis.url"
            raise CannotSay(f"no Redis at {server.shown}: {printable(said(error))}; see {option}") from error
        raise CannotSay(
            f"no Redis: set redis.url, or start `smtp-dup up` with this --state-dir ({settings.state_dir})"
        ) from error
