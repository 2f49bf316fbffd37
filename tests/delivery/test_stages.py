"""What a recipient's reply was the reply to: kept with the copy until its outcome is written."""

from __future__ import annotations

import pytest
import redis

from support.ledger_contents import Contents, settings
from support.reactions import Close, Reaction
from support.scripted_server import ScriptedServer
from workers.delivery.copy import Copy
from workers.delivery.courier import Courier
from workers.delivery.outcomes import Conclusion


@pytest.mark.parametrize(
    ("moment", "reaction", "stages"),
    [
        ("MAIL", "550 5.7.1 no", {0: "MAIL", 1: "MAIL"}),
        ("RCPT TO:<one", "450 4.2.0 later", {0: "RCPT"}),
        ("RCPT", "550 5.1.1 no", {0: "RCPT", 1: "RCPT"}),
        ("DATA", "554 5.7.1 no", {0: "DATA", 1: "DATA"}),
        (".", "554 5.7.1 no", {0: "dot", 1: "dot"}),
        (".", "451 4.3.0 later", {0: "dot", 1: "dot"}),
        (".", Close(), {0: "own", 1: "own"}),
        ("MAIL", None, {}),
    ],
)
async def test_the_stage_of_each_reply(
    redis_client: redis.Redis,
    redis_url: str,
    backup: ScriptedServer,
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
    reaction: Reaction,
    stages: dict[int, str],
) -> None:
    """MAIL, RCPT, DATA, the dot, or nothing that the server said: for those whom it did not take, and nobody else."""
    assert await _stages(redis_client, redis_url, backup, monkeypatch, {moment: reaction}) == stages


async def test_a_refusal_of_our_own(
    redis_client: redis.Redis, redis_url: str, backup: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the server cannot take is refused here, and counts as ours."""
    backup.extensions[:] = ["SIZE 10"]
    assert await _stages(redis_client, redis_url, backup, monkeypatch, {}) == {0: "own", 1: "own"}


async def test_what_was_asked_for_in_two_transactions(
    redis_client: redis.Redis, redis_url: str, backup: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too many recipients for one transaction: each keeps the stage of its own last reply."""
    replies: dict[str, Reaction] = {
        "RCPT TO:<two": ["452 4.5.3 too many recipients", None],
        ".": [None, "554 5.7.1 no"],
    }
    assert await _stages(redis_client, redis_url, backup, monkeypatch, replies) == {1: "dot"}


async def _stages(
    redis_client: redis.Redis,
    redis_url: str,
    backup: ScriptedServer,
    monkeypatch: pytest.MonkeyPatch,
    replies: dict[str, Reaction],
) -> dict[int, str]:
    """Deliver a copy for one@test and two@test; returns the stages that its outcome is written from."""
    contents = Contents(redis_client, "new")
    contents.register(backup.destination("new"))
    message_id = contents.pending("one@test", "two@test")
    backup.replies.update(replies)
    courier = Courier(settings(), backup.destination("new"), "worker", redis_url)
    found: list[dict[int, str]] = []
    conclude = courier._outcomes.conclude

    def noted(copy: Copy, job: str) -> Conclusion:
        found.append({i: stage.value for i, stage in copy.stages.items() if i in copy.never or i in copy.later})
        return conclude(copy, job)

    monkeypatch.setattr(courier._outcomes, "conclude", noted)
    await courier.start()
    try:
        await courier.deliver("job", [message_id])
    finally:
        await courier.drain()
    (stages,) = found
    return stages
