"""A courier's rounds: one connection, and the copies that go over it one transaction after the other.

When all has gone smoothly for a while, the next copy's MAIL leaves behind the dot of the one before, its reply not yet
here. What the server says is read into the copy, and into the breaker: a copy that met the server's trouble goes back
untried, one whose transaction broke off is deferred. A connection that ends between two copies is nobody's fault.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from relay import maillog, metrics
from relay.connection import ClientError, Connection
from relay.envelope import Destination, Reply
from relay.ledger import Claim
from relay.pool import Pool
from relay.sections import RelaySettings
from workers.batches import Batch, Batches
from workers.bodies import Bodies
from workers.copies import Copy
from workers.retry import Breaker, Width
from workers.transaction import Group, Outcome, Unfit, can_follow, group, send

_SMOOTH = 20  # copies taken one after the other, each soon, before the next one's MAIL is sent behind a dot
_SOON = 2.0  # seconds that a transaction may take for that


@dataclass(slots=True)
class _Trial:
    """A copy on a connection; ``begun`` is what was sent behind the dot of the one before, ``following`` the next."""

    batch: Batch
    copy: Copy
    begun: Group | None = None
    outcome: Outcome = field(default_factory=Outcome)
    following: _Trial | None = None


class Rounds:
    """The rounds of one courier; each call of ``make`` is one, and several go on at once."""

    def __init__(
        self,
        destination: Destination,
        relay: RelaySettings,
        pool: Pool,
        bodies: Bodies,
        batches: Batches,
        breaker: Breaker,
        width: Width,
        *,
        hire: Callable[[], None],
        is_held_up: Callable[[], bool],
    ) -> None:
        """``hire`` is called when a copy has been seen to, ``is_held_up`` asked before the next one follows."""
        self._destination = destination
        self._relay = relay
        self._pool = pool
        self._bodies = bodies
        self._batches = batches
        self._breaker = breaker
        self._width = width
        self._hire = hire
        self._is_held_up = is_held_up
        self._smooth = 0  # copies taken soon, since there was anything else

    async def make(self, batch: Batch, copy: Copy) -> None:
        """Try a copy once, and others behind it: then each one's outcome is being written, or it is in its batch."""
        trial = _Trial(batch, copy)
        try:
            connection = await self._pool.lease(timeout=self._relay.timeout_seconds)
        except ClientError as error:
            self._trouble()
            self._breaker.opens(str(error))
            self._untried(trial)
            return
        except BaseException:
            self._batches.end(trial.batch, trial.copy.id, broken=True)
            raise
        reused = connection.transactions > 0
        following: _Trial | None = trial
        try:
            while following is not None:
                trial = following
                await self._transact(connection, trial, reused=reused)
                self._batches.end(trial.batch, trial.copy.id)
                following, reused = trial.following, True
                if following is not None and not connection.is_open:
                    self._untried(following)
                    break
                self._hire()
        except BaseException:
            connection.close()
            if trial.outcome.sent:  # its lease is given up below, and what the server said is lost
                maillog.repeated(trial.copy.id, self._destination.name, "its delivery was broken off")
            while following is not None:
                self._batches.end(following.batch, following.copy.id, broken=True)
                following = following.following
            raise
        finally:
            self._pool.give_back(connection)

    async def _transact(self, connection: Connection, trial: _Trial, *, reused: bool) -> None:
        """Carry out one transaction; the next one may begin behind its dot."""
        started = self._breaker.clock()

        def following() -> Group | None:
            trial.following = self._follower(connection)
            return None if trial.following is None else trial.following.begun

        try:
            await send(
                connection,
                trial.copy.message,
                list(trial.copy.owed),
                trial.outcome,
                timeout=self._relay.timeout_seconds,
                final_timeout=self._relay.final_timeout_seconds,
                begun=trial.begun,
                following=following,
            )
        except Unfit as unfit:
            trial.copy.refuse(unfit.reply)
            self._batches.conclude(trial.batch, trial.copy)
        except ClientError as error:
            connection.close()
            self._smooth = 0
            self._broke_off(trial.batch, trial.copy, trial.outcome, error, reused=reused)
        else:
            if reused and trial.outcome.is_farewell:
                connection.close()
                self._batches.put_back(trial.batch, trial.copy)  # so many messages and no more on one connection
                return
            is_smooth = trial.outcome.is_taken and self._breaker.clock() - started < _SOON
            self._smooth = self._smooth + 1 if is_smooth else 0
            if trial.following is not None and not trial.outcome.is_taken:
                connection.close()  # a server that refuses before the dot and again at it: whose reply would be next?
            self._read(trial.batch, trial.copy, trial.outcome)

    def _follower(self, connection: Connection) -> _Trial | None:
        """Return what may be begun on a connection before its last dot is answered, and is at hand."""
        batch = self._batches.next()
        if batch is None or self._smooth < _SMOOTH or self._is_held_up() or not self._pool.can_go_on(connection):
            return None
        item = batch.work[0]
        if not isinstance(item, Claim):
            return None
        message = self._bodies.at_hand(item.id)
        if message is None or not can_follow(connection, message):
            return None
        copy = Copy.of(item, message, self._destination)
        with suppress(Unfit):  # told when its turn comes
            if copy.owed:
                trial = _Trial(batch, copy, group(connection, message, copy.owed))
                self._batches.begin(batch)
                self._bodies.drop([item.id])
                return trial
        return None

    def _untried(self, trial: _Trial) -> None:
        self._batches.put_back(trial.batch, trial.copy)
        self._batches.end(trial.batch, trial.copy.id)

    def _broke_off(self, batch: Batch, copy: Copy, outcome: Outcome, error: ClientError, *, reused: bool) -> None:
        """The connection did not carry the transaction through."""
        if reused and ((not outcome.replies and error.reply is None) or outcome.is_farewell):
            # A kept connection that the server had closed meanwhile, or has had enough of: nobody's fault.
            self._batches.put_back(batch, copy)
            return
        self._trouble()
        if not outcome.replies:
            self._breaker.opens(str(error))
            self._batches.put_back(batch, copy)
            return
        self._breaker.breaks(str(error))
        if outcome.sent:
            maillog.repeated(copy.id, self._destination.name, str(error))
        elif error.reply is not None and error.reply.is_permanent:
            copy.read(outcome, soft_bounce=self._destination.soft_bounce)  # it refused the body before its end
        copy.defer(Reply.of(451, f"4.4.2 {error}"))
        self._batches.conclude(batch, copy)

    def _read(self, batch: Batch, copy: Copy, outcome: Outcome) -> None:
        """Read what the server said of a transaction that it carried through."""
        if outcome.round_trip is not None:
            self._width.note(outcome.round_trip)
            self._breaker.limit = self._width.now
        server = copy.read(outcome, soft_bounce=self._destination.soft_bounce)
        if server is not None:
            self._trouble()
            self._breaker.opens(server.text)
        elif copy.is_refused and self._breaker.refuses(next(iter(copy.never.values()))):
            copy.take_back_refusals()
        else:
            if copy.taken:
                self._breaker.took()
            self._breaker.works()
        if copy.owed:  # the server is in trouble, or there were too many recipients for one transaction
            self._batches.put_back(batch, copy)
        else:
            self._batches.conclude(batch, copy)

    def _trouble(self) -> None:
        metrics.deliveries.labels(self._destination.name, "trouble").inc()
