"""Messages in a ledger, put there as the relay does, and the worker's part of their life without a worker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import redis
from rq import Queue
from rq.job import JobStatus

from relay.config.loader import Settings, load
from relay.ledger import changes, keys, queries, registry, rq_jobs
from relay.ledger.changes import Claim, Released, Staged
from relay.ledger.copy_state import CopyState
from relay.mail.destination import Destination
from relay.mail.envelope import Envelope
from relay.mail.ids import IdSource
from relay.mail.recipient import Recipient
from relay.mail.record import Message
from support import batches
from workers.queues import failed

DAY = 86400.0
BODY = b"Received: from a\r\nSubject: hello\r\nMessage-ID: <%s@test>\r\n\r\n..dots\r\ntext\r\n"
_ids = IdSource()


def settings(**options: str) -> Settings:
    """Return settings as a file with these options would give them; ``retry_first`` stands for ``retry.first``."""
    flags = {name if name == "state_dir" else name.replace("_", ".", 1): value for name, value in options.items()}
    return load({"relay.destination_primary": "localhost:25", **flags}, environ={}, directories=())


class Contents:
    """The ledger of a test: a few calls put messages and copies in any state that they can be in."""

    def __init__(self, connection: redis.Redis, *names: str, **definition: Any) -> None:
        self.connection = connection
        self.destinations = {
            name: Destination(name=name, host="localhost", port=25, **definition) for name in names or ("new",)
        }
        self.register(*self.destinations.values())

    def register(self, *destinations: Destination) -> None:
        self.destinations |= {d.name: d for d in destinations}
        with self.connection.pipeline() as pipe:
            registry.register(pipe, destinations)
            pipe.sadd(keys.LISTS, "")  # these are all
            pipe.execute()

    def queue(self, name: str = "new") -> Queue:
        return rq_jobs.queue(self.connection, name)

    # Life of a message

    def staged(
        self,
        *recipients: str,
        to: Sequence[str] = ("new",),
        deadline: float = 600.0,
        body: bytes | None = None,
        message_id: str = "",
        sender: str = "sender@test",
        spare_of: str = "",
    ) -> str:
        """Stage a message; the deadline in seconds from now."""
        message_id = message_id or _ids.next()
        body = BODY % message_id.encode() if body is None else body
        envelope = Envelope(
            id=message_id,
            sender=sender,
            recipients=tuple(Recipient(r) for r in recipients or ("a@test",)),
            received_at=changes.now(self.connection),
            size=len(body),
            destinations=tuple(to),
            spare_of=spare_of,
        )
        with self.connection.pipeline() as pipe:
            batches.stage(
                pipe, [Staged(message_id, Message(envelope, body).packed(), changes.now(self.connection) + deadline)]
            )
            pipe.execute()
        return message_id

    def pending(self, *recipients: str, to: Sequence[str] = ("new",), age: float = 60.0, **more: Any) -> str:
        """Have a message accepted so many seconds ago, without a job."""
        message_id = self.staged(*recipients, to=to, **more)
        with self.connection.pipeline() as pipe:
            changes.release(pipe, [Released(message_id, tuple(to))])
            assert pipe.execute() == [[1]]
        for name in to:
            self.connection.zadd(keys.PENDING + name, {message_id: changes.now(self.connection) - age})
        return message_id

    def enqueue(self, *ids: str, to: str = "new") -> str:
        """Write a job for copies, as the relay does. Returns its id."""
        with self.connection.pipeline() as pipe:
            job = rq_jobs.enqueue(pipe, self.queue(to), to, ids)
            pipe.execute()
        return job

    def claim(self, job: str, *ids: str, to: str = "new", lease: float = 60.0, worker: str = "worker") -> list[Claim]:
        """Claim copies as the worker that runs this job."""
        with self.connection.pipeline() as pipe:
            changes.claim(pipe, to, job, worker, lease, ids)
            return changes.claimed(pipe.execute()[0])[0]

    def fail(
        self,
        message_id: str,
        reply: str = "550 5.1.1 unknown",
        *,
        to: str = "new",
        owed: tuple[int, ...] | None = None,
        ago: float = 0.0,
        remains: CopyState | None = None,
        attempts: int = 0,
    ) -> CopyState:
        """Have a pending copy fail, so many seconds ago."""
        (envelope,) = queries.envelopes(self.connection, [message_id])
        state = CopyState(owed=owed, attempts=attempts).tried(changes.now(self.connection), reply)
        with self.connection.pipeline() as pipe:
            state = failed.add_failure(pipe, self.queue(to), to, message_id, state, remains, reply, 30 * DAY, envelope)
            pipe.execute()
        if ago:
            self.connection.zadd(keys.FAILED + to, {message_id: changes.now(self.connection) - ago})
        return state

    def failed(self, *recipients: str, to: str = "new", **more: Any) -> str:
        message_id = self.pending(*recipients, to=(to,))
        self.fail(message_id, to=to, **more)
        return message_id

    def defer(self, *ids: str, to: str = "new", seconds: float = 300.0, owed: tuple[int, ...] | None = None) -> str:
        """Have copies deferred together. Returns the scheduled job."""
        job = rq_jobs.create(self.queue(to), to, ids, JobStatus.SCHEDULED)
        clock = changes.now(self.connection)
        accepted = self.connection.zmscore(keys.PENDING + to, list(ids))
        states = {
            message_id: CopyState(job=job.id, owed=owed, since=at or clock).tried(clock, "451 4.7.1 later")
            for message_id, at in zip(ids, accepted, strict=True)
        }
        with self.connection.pipeline() as pipe:
            changes.defer(pipe, to, states)
            rq_jobs.schedule(pipe, self.queue(to), job, datetime.fromtimestamp(clock + seconds, UTC))
            pipe.execute()
        return job.id

    def pause(self, name: str = "new", reason: str = "connection refused", probe_in: float = 30.0) -> None:
        """Have the courier of a destination say that its server is in trouble."""
        clock = changes.now(self.connection)
        health = {"state": "paused", "reason": reason, "probe_at": clock + probe_in, "since": clock - 60}
        self.connection.hset(keys.HEALTH + name, mapping=health)

    def many(
        self, count: int, to: str = "new", *, failed: bool = False, replies: Sequence[str] = ("550 5.1.1 no",)
    ) -> None:
        """Put so many copies straight into a list: the n-th is n seconds old, from s<n>@n<n%10>.test.

        It is for r<n>@d<n%100>.test. Those that failed have these replies in turn; those that wait were never tried.
        """
        clock = changes.now(self.connection)
        for start in range(0, count, 2000):
            records, scores, states = {}, {}, {}
            for n in range(start, min(start + 2000, count)):
                message_id, at = _ids.next(), clock - n
                sender, recipient = f"s{n}@n{n % 10}.test", Recipient(f"r{n}@d{n % 100}.test")
                envelope = Envelope(message_id, sender, (recipient,), at, 4, destinations=(to,))
                records[keys.MESSAGE + message_id] = Message(envelope, b"xx\r\n").pack()
                scores[message_id] = at
                state = CopyState(f"job-{n}", since=at).tried(at, replies[n % len(replies)])
                states[message_id] = state.to_wire()
            with self.connection.pipeline(transaction=False) as pipe:
                pipe.mset(records)
                pipe.zadd((keys.FAILED if failed else keys.PENDING) + to, scores)
                if failed:
                    pipe.hset(keys.FAILURE + to, mapping=states)
                pipe.execute()

    # Questions

    def pending_ids(self, name: str = "new") -> list[str]:
        return [i.decode() for i in self.connection.zrange(keys.PENDING + name, 0, -1)]

    def failed_ids(self, name: str = "new") -> list[str]:
        return [i.decode() for i in self.connection.zrange(keys.FAILED + name, 0, -1)]

    def state(self, message_id: str, to: str = "new", *, failure: bool = False) -> CopyState:
        key = (keys.FAILURE if failure else keys.OWN) + to
        return CopyState.from_wire(self.connection.hget(key, message_id))

    def has_body(self, message_id: str) -> bool:
        return bool(self.connection.exists(keys.MESSAGE + message_id))

    def queued(self, name: str = "new") -> Mapping[str, list[str]]:
        """Return the ids in each queued job."""
        return {job.id: job.args[1] for job in self.queue(name).get_jobs()}
