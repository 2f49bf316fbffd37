"""A run: one connection, and the copies that go over it one transaction after the other.

When all has gone smoothly for a while, the next copy's MAIL leaves behind the dot of the one before, its reply not yet
here. What the server says is read into the copy, and into the breaker: a copy that met the server's trouble goes back
untried, behind the others, one whose transaction broke off is deferred. So is one that meets trouble again, or for
long, when the server has carried others through meanwhile: it is that copy's own. A connection that ends between two
copies is nobody's fault. Each copy comes back to the caller with its ending as soon as it has one.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

from relay import maillog, metrics
from relay.breaker import Breaker
from relay.client.connection import Connection
from relay.client.errors import ClientError, ConnectionGone, DeadlinePassed
from relay.client.pool import Pool, PoolExhausted
from relay.config.model import RelaySettings
from relay.ledger.changes import Claim
from relay.mail.destination import Destination
from relay.mail.reply import Reply
from workers.delivery.bodies import Bodies
from workers.delivery.copy import Copy
from workers.delivery.gate import Gate
from workers.delivery.jobs_in_hand import Ending, JobInHand, JobsInHand
from workers.delivery.refusals import RefusalMemory
from workers.delivery.retry import Width
from workers.delivery.runners import Runner
from workers.delivery.transaction import Opening, Outcome, Unfit, can_follow, opening, send

_SMOOTH = 20  # copies taken one after the other, each soon, before the next one's MAIL is sent behind a dot
_SOON = 2.0  # seconds that a transaction may take for that
_REPETITIONS = 2  # of what a reused connection refused or broke off; the pool may lend another such
_SUSPECTS = 1000  # copies that met trouble of the server and are remembered


@dataclass(slots=True)
class Trial:
    """A copy on a connection; ``begun`` is what was sent behind the dot of the one before, ``following`` the next."""

    job: JobInHand
    copy: Copy
    runner: Runner
    begun: Opening | None = None
    is_look: bool = False  # it was chosen to be unlike what was refused before
    outcome: Outcome = field(default_factory=Outcome)
    following: Trial | None = None
    ending: Ending = Ending.AGAIN


class ConnectionRuns:
    """The runs of one courier; each call of ``run`` is one, and several go on at once."""

    def __init__(
        self,
        destination: Destination,
        relay: RelaySettings,
        pool: Pool,
        bodies: Bodies,
        jobs: JobsInHand,
        gate: Gate,
        breaker: Breaker,
        width: Width,
        refusals: RefusalMemory,
    ) -> None:
        self._destination = destination
        self._relay = relay
        self._patience = relay.timeouts.command  # for one reply
        self._pool = pool
        self._bodies = bodies
        self._jobs = jobs
        self._gate = gate
        self._breaker = breaker
        self._width = width
        self._refusals = refusals
        self._seconds = metrics.observer(metrics.backup_seconds, destination.name)
        self._smooth = 0  # copies taken soon, since there was anything else
        self._suspects: dict[str, int] = {}  # copies that met trouble -> transactions carried through by then

    async def run(
        self, job: JobInHand, copy: Copy, runner: Runner, *, is_look: bool = False
    ) -> AsyncGenerator[Trial, None]:
        """Try a copy once, and others behind it; yields each one with its ending, which the caller sees to."""
        trial = Trial(job, copy, runner, is_look=is_look)
        connection = await self._leased(job, copy, runner)
        if connection is None:
            yield trial
            return
        reused = connection.transactions > 0
        following: Trial | None = trial
        try:
            while following is not None:
                trial = following
                if trial.begun is None or connection.is_open:
                    trial.ending = await self._transact(connection, trial, reused=reused)
                yield trial
                following, reused = trial.following, True
        except BaseException:
            connection.close()
            if trial.outcome.sent:  # its lease is given up below, and what the server said is lost
                maillog.repeated(trial.copy.id, self._destination.name, "its delivery was broken off")
            while following is not None:
                self._jobs.abandon(following.job, following.copy.id)
                following = following.following
            raise
        finally:
            self._pool.give_back(connection)

    async def _leased(self, job: JobInHand, copy: Copy, runner: Runner) -> Connection | None:
        """Return a connection for a copy, or None: there is none now, and nobody has been asked about the copy."""
        try:
            return await self._pool.lease(timeout=self._relay.timeout_seconds, fresh=copy.repeats > 0)
        except PoolExhausted:
            return None  # no trouble of the server's: those that hang have them all
        except ClientError as error:
            self._trouble()
            if runner.is_outrun:
                self._breaker.breaks(str(error))  # this connection, or address: others have worked meanwhile
            else:
                self._breaker.opens(str(error))
            return None
        except BaseException:
            if runner.is_cut:
                return None
            self._jobs.abandon(job, copy.id)
            raise

    async def _transact(self, connection: Connection, trial: Trial, *, reused: bool) -> Ending:
        """Carry out one transaction; the next one may begin behind its dot."""
        runner = trial.runner

        def let_go() -> None:
            """Have what was begun behind a dot that is not answered tried elsewhere; none of its body has been sent."""
            self._smooth = 0
            if trial.following is not None:
                following, trial.following = trial.following, None
                self._jobs.finish(following.job, following.copy, Ending.AGAIN)

        def following() -> Opening | None:
            trial.following = None if runner.is_slow else self._follower(connection, runner)
            return None if trial.following is None else trial.following.begun

        runner.begins(connection, let_go, attempts=trial.copy.state.attempts)
        try:
            await send(
                connection,
                trial.copy.message,
                trial.copy.next_owed,
                trial.outcome,
                timeout=self._patience,
                final_timeout=self._relay.final_timeout_seconds,
                begun=trial.begun,
                following=following,
            )
        except Unfit as unfit:
            trial.copy.refuse(unfit.reply)
            return Ending.ANSWERED
        except ClientError as error:
            self._smooth = 0
            is_before_body = not (connection.in_data or trial.outcome.sent)
            connection.close()
            if runner.is_cut and not trial.outcome.sent:
                return Ending.LAST
            return self._broke_off(trial, error, reused=reused, is_before_body=is_before_body)
        if reused and trial.outcome.is_farewell:
            connection.close()
            return Ending.AGAIN  # so many messages and no more on one connection
        runner.ends()
        is_taken = trial.outcome.is_taken
        is_smooth = is_taken and self._breaker.clock() - runner.begun_at < _SOON
        self._smooth = self._smooth + 1 if is_smooth else 0
        if trial.following is not None and not is_taken:
            connection.close()  # a server that refuses before the dot and again at it: whose reply would be next?
        ending = self._read(trial, reused=reused)
        if trial.copy.doubted is not None:
            connection.close()
        return ending

    def _follower(self, connection: Connection, runner: Runner) -> Trial | None:
        """Return what may be begun on a connection before its last dot is answered, and is at hand."""
        job = self._jobs.next()
        if job is None or self._smooth < _SMOOTH or self._gate.is_closed or not self._pool.can_go_on(connection):
            return None
        item = job.work[0]
        if not isinstance(item, Claim):
            return None
        message = self._bodies.at_hand(item.id)
        if message is None or not can_follow(connection, message):
            return None
        copy = Copy.of(item, message, self._destination)
        try:
            begun = opening(connection, message, copy.next_owed) if copy.owed else None
        except Unfit:  # refused when its turn comes
            begun = None
        if begun is None:
            return None
        self._gate.begins()
        self._jobs.begin(job)
        self._bodies.drop([item.id])
        return Trial(job, copy, runner, begun)

    def _broke_off(self, trial: Trial, error: ClientError, *, reused: bool, is_before_body: bool) -> Ending:
        """Say what becomes of a copy when the connection did not carry its transaction through."""
        copy, outcome = trial.copy, trial.outcome
        if trial.runner.gave_up:
            error = DeadlinePassed("no reply for long, while others wait for a connection", stage=error.stage)
        elif outcome.is_answered(copy.next_owed) and not outcome.is_farewell:
            return self._read(trial, reused=reused)  # it refused MAIL, or every RCPT, and closed
        elif reused and (outcome.is_farewell or not (outcome.is_begun or error.reply or trial.runner.is_outrun)):
            return Ending.AGAIN  # the server had closed a kept connection, or has had enough of it: nobody's fault
        elif reused and is_before_body and self._may_repeat(trial) and isinstance(error, ConnectionGone):
            copy.repeats += 1  # so many recipients, or refusals, and no more on one connection
            return Ending.AGAIN
        self._trouble()
        is_its_own = trial.runner.is_outrun
        if not (outcome.sent or outcome.replies or is_its_own or trial.runner.gave_up):
            is_its_own = self._is_known(copy)
            if not is_its_own:
                self._doubt(copy, str(error))
                return Ending.LAST
        if not is_its_own:
            self._doubt(copy, str(error))
        if outcome.sent:
            maillog.repeated(copy.id, self._destination.name, str(error))
        else:
            outcome.forget_accepted()  # a yes to RCPT is none to the message
            if error.reply is not None and error.reply.is_permanent and not is_before_body:
                outcome.replies.update(dict.fromkeys(outcome.accepted, error.reply))  # it refused the body
        copy.read(outcome, soft_bounce=self._destination.soft_bounce)
        copy.defer(Reply.of(451, f"4.4.2 {error}"), is_about_it=is_its_own)
        return Ending.ANSWERED

    @staticmethod
    def _may_repeat(trial: Trial) -> bool:
        return trial.copy.repeats < _REPETITIONS and not trial.runner.is_outrun

    def _read(self, trial: Trial, *, reused: bool) -> Ending:
        """Read what the server said of a transaction that it carried through."""
        copy, outcome = trial.copy, trial.outcome
        self._note_times(outcome)
        copy.seconds = outcome.digestion
        doubted, refusals = copy.doubted, self._pool.refusals
        may_repeat = reused and copy.repeats < _REPETITIONS
        is_doubtful = refusals.is_doubtful if may_repeat else None
        server = copy.read(outcome, soft_bounce=self._destination.soft_bounce, is_doubtful=is_doubtful)
        if doubted is not None and copy.doubted is None:
            refusals.settle(doubted, outcome.replies.values())
        if copy.doubted is not None:
            copy.repeats += 1
            if copy.yes:
                self._breaker.took()
                self._breaker.works()
            return Ending.AGAIN
        if server is not None:
            self._trouble()
            if self._is_known(copy):
                copy.defer(server, is_own=False)
            else:
                self._doubt(copy, server.text)
        elif not copy.yes and copy.is_refused:
            # It was answered about itself: what this says of the server is found out with other mail.
            self._refusals.refused(copy, outcome)
            self._breaker.refuses(next(iter(copy.never.values())), is_look=trial.is_look)
        else:
            if copy.yes:
                self._breaker.took()
                self._refusals.took(copy, outcome)
            self._breaker.works()
        if copy.owed:  # the server is in trouble, or there were too many recipients for one transaction
            return Ending.AGAIN if server is None else Ending.LAST
        return Ending.ANSWERED

    def _note_times(self, outcome: Outcome) -> None:
        if outcome.round_trip is not None:
            self._width.note(outcome.round_trip)
            self._breaker.limit = self._width.now
        if outcome.digestion is not None:
            self._seconds(outcome.digestion)

    def _doubt(self, copy: Copy, reason: str) -> None:
        """Note trouble within a transaction: it may be this copy's doing, which other mail will show."""
        self._refusals.troubled(copy)
        self._breaker.breaks(reason)

    def _is_known(self, copy: Copy) -> bool:
        """Say whether a copy that meets trouble has met it before, and others were carried through since."""
        before = self._suspects.pop(copy.id, None)
        if before is not None and before < self._breaker.carried:
            return True
        self._suspects[copy.id] = self._breaker.carried
        if len(self._suspects) > _SUSPECTS:
            del self._suspects[next(iter(self._suspects))]
        return False

    def has_met_trouble(self, message_id: str) -> bool:
        """Say whether a copy was tried when the server was in trouble, and may be the cause."""
        return message_id in self._suspects

    def tells_nothing(self, message_id: str) -> bool:
        """Say whether a copy has met trouble, and nothing has been carried through since."""
        return self._suspects.get(message_id, -1) >= self._breaker.carried

    def _trouble(self) -> None:
        metrics.deliveries.labels(self._destination.name, "trouble").inc()
