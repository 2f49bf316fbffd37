"""Pings a Redis every millisecond from a process of its own, and prints the times when its standard input ends.

JSON: ``{"count", "p50_ms", "p99_ms", "max_ms"}``. What it sees includes the waiting for a core of its own.
"""

from __future__ import annotations

import json
import select
import sys
import time

import redis

from bench.results import percentile


def main() -> None:
    times = []
    with redis.Redis.from_url(sys.argv[1]) as client:
        client.ping()
        print("ready", flush=True)
        while not select.select([sys.stdin], [], [], 0.001)[0]:
            begun = time.perf_counter()
            client.ping()
            times.append(1000 * (time.perf_counter() - begun))
    print(
        json.dumps(
            {
                "count": len(times),
                "p50_ms": percentile(times, 0.5),
                "p99_ms": percentile(times, 0.99),
                "max_ms": max(times, default=0.0),
            }
        )
    )


if __name__ == "__main__":
    main()
