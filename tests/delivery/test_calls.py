"""What a copy costs the worker, as a count: exact on a busy machine, where a time says nothing."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import CodeType, FrameType

import redis

import relay
import workers
from support.ledger_contents import Contents
from support.running_courier import at_work
from support.scripted_server import ScriptedServer
from support.waiting import until

_OURS = tuple(str(Path(package.__path__[0])) for package in (relay, workers))
_COPIES = 400
_MOST = 380  # calls for each copy, reading the replies and writing the log included; measured: 337


async def test_a_copy_costs_so_many_calls(redis_client: redis.Redis, redis_url: str, backup: ScriptedServer) -> None:
    """Of what is in this repository, for a copy that is taken at its first try: a change that adds tenths is seen."""
    contents = Contents(redis_client, "new")
    ids = [contents.pending(f"{n}@test") for n in range(_COPIES)]
    calls: Counter[CodeType] = Counter()

    def count(frame: FrameType, event: str, _: object) -> None:
        if event in {"call", "c_call"} and frame.f_code.co_filename.startswith(_OURS):
            calls[frame.f_code] += 1

    async with at_work(redis_url, backup) as work:
        await until(lambda: work.courier.accepting)
        sys.setprofile(count)
        try:
            for start in range(0, _COPIES, 100):
                await work.courier.deliver("job", ids[start : start + 100])
        finally:
            sys.setprofile(None)
    assert contents.pending_ids() == []
    dearest = [f"{code.co_qualname} {number / _COPIES:.1f}" for code, number in calls.most_common(25)]
    assert calls.total() / _COPIES <= _MOST, ", ".join(dearest)
