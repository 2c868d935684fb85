"""Jobs that fall due start by the clock, not by the poll: with a free slot, and nobody who hints."""

from __future__ import annotations

import statistics

import pytest

from tests.faults.rig.cluster import Cluster
from tests.faults.rig.system import System, system

LATE_S = 0.100
RATE = 25
SECONDS = 8
RETRY = """\
  ledger:
    retry:
      max_attempts: 3
      backoff: fixed
      backoff_base: 700ms
      jitter: full
"""


def p99(values: list[float]) -> float:
    return statistics.quantiles(values, n=100)[98]


async def lateness(case: System) -> list[float]:
    """Return for each job by how many seconds its last run began after it was due; never below zero."""
    rows = await case.ask(
        "select extract(epoch from started_at - run_at)::float8 from taskd.outcomes order by 1"
    )
    return [float(late) for (late,) in rows]


async def begin(case: System) -> None:
    case.api()
    case.worker("one")
    case.worker("two")
    await case.ready("one", "two")


async def test_scheduled_jobs_start_when_they_are_due(durable: Cluster) -> None:
    async with system(durable, concurrency=32) as case:
        await begin(case)

        def body(n: int) -> dict[str, object]:
            # Shorter than a poll, and longer.
            delay = round(case.dice.uniform(0.1, 3.0), 3)
            return {"type": "ledger", "payload": {"n": n, "ms": 1}, "delay": delay}

        async with case.load(body, rate=RATE, seconds=SECONDS):
            pass
        await case.quiet(20)

        await case.check()
        late = await lateness(case)
        print(
            f"late: median {statistics.median(late):.4f} s, p99 {statistics.quantiles(late, n=100)[98]:.4f} s"
        )
        assert min(late) >= 0
        assert p99(late) <= LATE_S


@pytest.mark.parametrize("kind", ["delay", "retry"])
async def test_a_single_short_wait_is_kept_on_an_idle_node(durable: Cluster, kind: str) -> None:
    async with system(durable, more=RETRY) as case:
        await begin(case)

        def body(n: int) -> dict[str, object]:
            payload: dict[str, object] = {"n": n, "ms": 1}
            if kind == "delay":
                return {"type": "ledger", "payload": payload, "delay": 0.25}
            return {"type": "ledger", "payload": payload | {"fails": 1}}

        async with case.load(body, rate=1.3, seconds=6):
            pass
        await case.quiet(20)

        await case.check()
        late = await lateness(case)
        print(f"late: {[round(one, 3) for one in late]}")
        assert max(late) <= LATE_S


async def test_retries_start_when_they_are_due(durable: Cluster) -> None:
    async with system(durable, concurrency=32, more=RETRY) as case:
        await begin(case)

        def body(n: int) -> dict[str, object]:
            return {"type": "ledger", "payload": {"n": n, "ms": 1, "fails": 1}}

        async with case.load(body, rate=RATE, seconds=SECONDS):
            pass
        await case.quiet(20)

        await case.check()
        late = await lateness(case)
        print(
            f"late: median {statistics.median(late):.4f} s, p99 {statistics.quantiles(late, n=100)[98]:.4f} s"
        )
        assert await case.count("taskd.outcomes where attempts = 2") == len(late) == RATE * SECONDS
        assert min(late) >= 0
        assert p99(late) <= LATE_S
