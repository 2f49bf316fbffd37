"""What comes back from Redis as an answer, or is asked there, is data: whatever it is, nobody ends with a traceback."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import redis

from relay.ledger import keys, questions
from relay.stopping import StopEvent
from relay.trace.remote_lookup import _answer, keep_answering
from support.hostile_values import LEAVES, RAW
from support.waiting import wait_until

ASKED = {"find": [["from", "m", "a@test"]], "status": "", "since": 0.0, "until": None, "limit": 10}


@pytest.mark.parametrize("name", ["place", "part", "end"])
def test_hostile_answers(redis_client: redis.Redis, name: str) -> None:
    """Only an answer of a host that was asked counts; the rest is passed over, and the end is found behind it."""
    genuine = {"place": "here", "part": {"events": []}, "end": False}
    key = keys.ANSWER + "reply"
    redis_client.rpush(key, *RAW, *(json.dumps({**genuine, name: leaf}) for leaf in LEAVES))
    redis_client.rpush(key, json.dumps({"place": "here", "end": True}))
    found = list(questions.answers(redis_client, "reply", {"here"}, 10))
    assert {place for place, _ in found} == {"here"}
    assert found[-1] == ("here", None)


@pytest.mark.parametrize("name", [*ASKED, "ids", "recipients"])
def test_hostile_questions(tmp_path: Path, name: str) -> None:
    """Each is answered by nothing."""
    for leaf in (*LEAVES, 9_999_999_999_999_999_999, [[[], [], []]], [["from", {}, 1]]):
        list(_answer({**ASKED, name: leaf}, tmp_path))


def test_who_answers_goes_on(redis_client: redis.Redis, redis_url: str, tmp_path: Path) -> None:
    """After all that, and after a list of another type, the next question has its answer."""
    stop = StopEvent()
    thread = threading.Thread(
        target=keep_answering, args=(lambda: redis.Redis.from_url(redis_url), tmp_path, "here", stop)
    )
    thread.start()
    try:
        asked = [json.dumps({"asked": {**ASKED, "since": leaf}, "reply": "other"}) for leaf in LEAVES]
        redis_client.rpush(keys.ASK + "here", *RAW, *asked)
        wait_until(lambda: not redis_client.exists(keys.ASK + "here"))
        reply_to = questions.ask(redis_client, ["here"], ASKED)
        assert ("here", None) in list(questions.answers(redis_client, reply_to, {"here"}, 10))
    finally:
        stop.set()
        thread.join()
