"""The failed list: what an operator sees, and what they can do about it, there and in rq-dashboard."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import redis
from rq.job import Job, JobStatus
from rq.serializers import JSONSerializer

from relay.ledger import changes, keys
from relay.ledger.copy_state import CopyState
from relay.ledger.queries import UnknownDestination, UnknownId
from relay.mail import encryption
from relay.mail.destination import Destination
from support import listed_copies
from support.ledger_contents import DAY, Contents
from workers.queues import failed


@pytest.fixture
def contents(redis_client: redis.Redis) -> Contents:
    return Contents(redis_client)


def _job(contents: Contents, job_id: str) -> Job:
    return Job.fetch(job_id, contents.connection, JSONSerializer)


def test_failure_is_a_failed_job_of_its_own_with_the_reply(contents: Contents) -> None:
    """rq-dashboard shows a failed copy as a failed job, with the server's reply."""
    message_id = contents.pending()
    state = contents.fail(message_id, "550 5.1.1 unknown user")
    queue = contents.queue()
    assert queue.failed_job_registry.get_job_ids() == [state.job]
    job = _job(contents, state.job)
    assert job.get_status() is JobStatus.FAILED
    assert job.args == ["new", [message_id]]
    with pytest.deprecated_call():  # what rq-dashboard shows
        assert job.exc_info == "550 5.1.1 unknown user"
    assert contents.connection.sismember(queue.redis_queues_keys, queue.key)
    assert contents.pending_ids() == []
    assert contents.failed_ids() == [message_id]
    assert contents.state(message_id, failure=True) == state


def test_a_failed_job_says_whose_mail_it_is_how_large_and_since_when(
    contents: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its description is for a person: sender, the recipients that failed, size; its times are those of the mail."""
    monkeypatch.setattr(encryption, "_ring", None)  # also with --sealed: the next test is about that
    message_id = contents.pending("a@test", "b\u202e@test", "c@test", "d@test", "e@test")
    state = contents.fail(message_id, owed=(0, 1, 3, 4))
    job = _job(contents, state.job)
    (row,) = listed_copies.failures(contents.connection)
    (detail,) = failed.show(contents.connection, message_id)
    assert job.description == (
        f"<sender@test> to <a@test>, <b\\u202e@test>, <d@test> and 1 more, {row.size / 1024:,.1f} KB"
    )
    assert job.created_at is not None
    assert job.ended_at is not None
    assert abs(job.created_at.timestamp() - detail.received_at) < 0.01
    assert abs(job.ended_at.timestamp() - state.history[-1].at) < 0.01


def test_a_failed_job_names_nobody_where_mail_is_sealed(
    contents: Contents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With storage.key_file no address reaches Redis in the clear, in RQ's jobs neither."""
    encryption.add_key(tmp_path / "keys")
    monkeypatch.setattr(encryption, "_ring", None)  # for this test only
    encryption.use(tmp_path / "keys")
    message_id = contents.pending("a@test")
    state = contents.fail(message_id)
    assert _job(contents, state.job).description.startswith("1 message to new, ")
    stored = [contents.connection.dump(key) for key in contents.connection.keys("rq:*")]
    assert stored
    assert not any(b"@test" in (data or b"") for data in stored)


def test_several_failures_in_one_transaction(contents: Contents) -> None:
    """Copies that fail together are written together, each with a job of its own."""
    ids = [contents.pending() for _ in range(5)]
    with contents.connection.pipeline(transaction=True) as pipe:
        states = [
            failed.add_failure(
                pipe, contents.queue(), "new", i, CopyState().tried(1.0, "550 no"), None, "550 no", 30 * DAY
            )
            for i in ids
        ]
        pipe.execute()
    assert sorted(contents.failed_ids()) == sorted(ids)
    assert len({s.job for s in states}) == 5
    assert contents.queue().failed_job_registry.count == 5


def test_a_transaction_whose_answer_was_lost_can_be_repeated(contents: Contents) -> None:
    """A failure that is written twice is one failure with one job."""
    message_id = contents.pending()
    first = contents.fail(message_id)
    assert contents.fail(message_id).job == first.job
    assert contents.state(message_id, failure=True) == first
    assert contents.failed_ids() == [message_id]
    assert contents.queue().failed_job_registry.get_job_ids() == [first.job]
    assert contents.connection.hget(keys.COUNTERS, "failed:new") == b"1"


def test_requeue_in_the_dashboard_retries_the_copy(contents: Contents) -> None:
    """RQ's Requeue puts the same job into the queue, and its claim moves the copy back to pending."""
    message_id = contents.pending("a@test", "b@test")
    state = contents.fail(message_id, owed=(1,))
    queue = contents.queue()
    queue.failed_job_registry.requeue(state.job)
    assert queue.get_job_ids() == [state.job]
    assert queue.failed_job_registry.count == 0
    (claim,) = contents.claim(state.job, message_id)
    assert (claim.id, claim.was_failed, claim.state.owed) == (message_id, True, (1,))
    assert contents.failed_ids() == []
    assert contents.pending_ids() == [message_id]


def test_listing_names_only_the_recipients_that_failed(contents: Contents) -> None:
    """A row shows who was refused, what was said, and how often it was tried."""
    message_id = contents.pending("a@test", "b@test", "c@test")
    contents.fail(message_id, "550 no", owed=(0, 2), remains=CopyState(owed=(1,)), attempts=2)
    (row,) = listed_copies.failures(contents.connection)
    assert (row.id, row.destination, row.sender) == (message_id, "new", "sender@test")
    assert row.recipients == ("a@test", "c@test")
    assert (row.reply, row.attempts) == ("550 no", 3)
    assert row.size > 0
    assert abs(row.failed_at - changes.now(contents.connection)) < 60
    assert contents.pending_ids() == [message_id]


def test_listing_without_indices_means_all_that_the_destination_wants(contents: Contents) -> None:
    """A copy that failed as a whole failed for the recipients in the destination's domains."""
    contents.register(Destination(name="shadow", host="localhost", port=26, domains=("two.test",)))
    message_id = contents.pending("a@one.test", "b@two.test", to=("shadow",))
    contents.fail(message_id, to="shadow")
    (row,) = listed_copies.failures(contents.connection, "shadow")
    assert row.recipients == ("b@two.test",)
    assert list(listed_copies.failures(contents.connection, "new")) == []


def test_listing_is_complete_beyond_a_page(contents: Contents) -> None:
    """A list longer than a page is shown once and whole, equal times included."""
    ids = {f"1d{n:014}" for n in range(1300)}
    contents.connection.zadd(keys.FAILED + "new", {i: 1000.0 + n // 700 for n, i in enumerate(sorted(ids))})
    rows = [row.id for row in listed_copies.failures(contents.connection)]
    assert len(rows) == 1300
    assert set(rows) == ids


def test_envelope_of_any_length_is_read(contents: Contents) -> None:
    """A message for a thousand recipients is listed with all of them."""
    addresses = tuple(f"recipient-{n:05}@a-rather-long-domain.test" for n in range(3000))
    contents.failed(*addresses)
    (row,) = listed_copies.failures(contents.connection)
    assert row.recipients == addresses


def test_show_adds_the_history(contents: Contents) -> None:
    """What was said at each attempt is kept, and shown per destination."""
    contents.register(Destination(name="other", host="localhost", port=26))
    message_id = contents.pending(to=("new", "other"))
    contents.fail(message_id, "550 one")
    contents.fail(message_id, "554 two", to="other")
    new, other = failed.show(contents.connection, message_id)
    assert (new.destination, other.destination) == ("new", "other")
    assert [a.reply for a in new.history] == ["550 one"]
    assert [a.reply for a in other.history] == ["554 two"]


def test_unknown_ids_and_destinations_are_named_and_nothing_happens(contents: Contents) -> None:
    """One wrong id among right ones changes nothing."""
    message_id = contents.failed()
    for act in (listed_copies.retry, listed_copies.drop_failed):
        with pytest.raises(UnknownId, match="nosuchid"):
            act(contents.connection, [message_id, "nosuchid"])
        with pytest.raises(UnknownDestination, match="nowhere"):
            act(contents.connection, listed_copies.EVERY, "nowhere")
    with pytest.raises(UnknownId):
        failed.show(contents.connection, "nosuchid")
    with pytest.raises(UnknownId):
        failed.export(contents.connection, "nosuchid")
    assert contents.failed_ids() == [message_id]
    assert contents.queued() == {}


def test_retry_of_many_leaves_in_jobs_of_a_hundred(contents: Contents) -> None:
    """250 copies are three jobs, each of which may claim what it holds; their failed jobs are gone."""
    ids = [contents.failed() for _ in range(250)]
    assert listed_copies.retry(contents.connection, listed_copies.EVERY) == 250
    jobs = contents.queued()
    assert [len(held) for held in jobs.values()] == [100, 100, 50]
    assert contents.queue().failed_job_registry.count == 0
    claimed = [c for job, held in jobs.items() for c in contents.claim(job, *held)]
    assert sorted(c.id for c in claimed) == sorted(ids)
    assert all(c.was_failed for c in claimed)
    assert contents.failed_ids() == []
    leftover = [k for k in contents.connection.scan_iter("rq:job:*") if k.decode()[len("rq:job:") :] not in jobs]
    assert leftover == []


def test_retry_works_when_the_job_was_deleted_in_the_dashboard(contents: Contents) -> None:
    """Deleting the job only hides the copy; it can still be retried."""
    message_id = contents.failed()
    _job(contents, contents.state(message_id, failure=True).job).delete()
    assert [row.id for row in listed_copies.failures(contents.connection)] == [message_id]
    assert listed_copies.retry(contents.connection, [message_id]) == 1
    ((job, held),) = contents.queued().items()
    assert [c.id for c in contents.claim(job, *held)] == [message_id]


def test_retry_of_one_destination_leaves_the_other(contents: Contents) -> None:
    """--destination narrows a retry."""
    contents.register(Destination(name="other", host="localhost", port=26))
    message_id = contents.pending(to=("new", "other"))
    contents.fail(message_id)
    contents.fail(message_id, to="other")
    assert listed_copies.retry(contents.connection, [message_id], "other") == 1
    assert list(contents.queued("other").values()) == [[message_id]]
    assert contents.queued() == {}


def test_a_second_retry_before_the_job_runs_does_not_double_the_copy(contents: Contents) -> None:
    """Whoever retries twice gets one claim."""
    message_id = contents.failed()
    listed_copies.retry(contents.connection, listed_copies.EVERY)
    listed_copies.retry(contents.connection, listed_copies.EVERY)
    claims = [c for job in contents.queued() for c in contents.claim(job, message_id)]
    assert len(claims) == 1


def test_retry_of_some_recipients_joins_those_still_owed(contents: Contents) -> None:
    """Recipients that failed and recipients that wait become one copy again."""
    message_id = contents.pending("a@test", "b@test")
    contents.fail(message_id, owed=(0,), remains=CopyState(job="other", owed=(1,)))
    listed_copies.retry(contents.connection, [message_id])
    ((job, _),) = contents.queued().items()
    (claim,) = contents.claim(job, message_id)
    assert sorted(claim.state.owed or ()) == [0, 1]


def test_drop_forgets_copy_body_and_job(contents: Contents) -> None:
    """A dropped copy is gone, with its body when nobody else wants it."""
    contents.register(Destination(name="other", host="localhost", port=26))
    alone, shared = contents.failed(), contents.pending(to=("new", "other"))
    contents.fail(shared)
    assert listed_copies.drop_failed(contents.connection, [alone, shared]) == 2
    assert contents.failed_ids() == []
    assert contents.queue().failed_job_registry.count == 0
    assert not contents.has_body(alone)
    assert contents.has_body(shared)
    assert contents.pending_ids("other") == [shared]


def test_export_is_the_message_as_it_was(contents: Contents) -> None:
    """Dots are undone where CRLF ends a line, and nowhere else."""
    body = b"..first\r\n..\r\n...\r\na\n..b\r\r\n..\r\n \xff\x00\r\n"
    message_id = contents.pending(body=body)
    contents.fail(message_id)
    assert failed.export(contents.connection, message_id) == b".first\r\n.\r\n..\r\na\n..b\r\r\n.\r\n \xff\x00\r\n"


def test_expired_failures_are_dropped(contents: Contents) -> None:
    """Only what is older than the time given goes, with body and job."""
    old, young = contents.failed(ago=2 * DAY), contents.failed(ago=DAY / 2)
    assert failed.expire(contents.connection, "new", DAY, changes.now(contents.connection) - DAY) == [old]
    assert contents.failed_ids() == [young]
    assert not contents.has_body(old)
    assert contents.queue().failed_job_registry.count == 1


def test_only_what_is_dropped_is_told_of_as_expired(contents: Contents, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, whatever somebody has written as its time; and not a copy that has failed anew since it was looked for."""
    strange, anew = contents.failed(ago=2 * DAY), contents.failed(ago=2 * DAY)
    contents.connection.zadd(keys.FAILED + "new", {strange: -math.inf})
    listed = [[(strange, 0.0), (anew, 5.0)]]
    monkeypatch.setattr(failed.queries, "pages", lambda *_, **__: listed)
    assert failed.expire(contents.connection, "new", DAY, changes.now(contents.connection)) == [strange]
    assert failed.expire(contents.connection, "new", DAY, changes.now(contents.connection)) == []
    assert contents.failed_ids() == [anew]


def test_stray_failed_jobs_are_deleted_and_others_stay(contents: Contents) -> None:
    """A failed job whose copy has been dropped or failed anew is of no use and goes."""
    message_id = contents.pending("a@test", "b@test")
    first = contents.fail(message_id, owed=(0,), remains=CopyState(owed=(1,)))
    second = contents.fail(message_id, owed=(1,), attempts=1)
    assert failed.forget_stray_jobs(contents.connection, "new") == [first.job]
    assert contents.queue().failed_job_registry.get_job_ids() == [second.job]
    assert contents.state(message_id, failure=True).owed in ((0, 1), (1, 0))
