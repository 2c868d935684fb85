"""Jobs in bulk past HTTP: by `taskd.submit_many`, as many at once as a backlog is to have."""

from __future__ import annotations

import json
from collections.abc import Callable

import psycopg

from tests.faults.rig.keeper import until
from tests.faults.rig.system import System

MOST = 10_000
"""What one call of `submit_many` takes."""
PATIENCE_S = 60.0
LANE = -7
"""The priority of the backlog: what comes by HTTP meanwhile goes first, and it is told apart."""


async def feed(case: System, jobs: int, type_of: Callable[[int], str]) -> None:
    """Submit `jobs` in one transaction; they are ready together when this returns."""
    numbers = range(case.tally.next, case.tally.next + jobs)
    case.tally.next += jobs
    case.tally.sent.update(numbers)
    accepted: dict[int, str] = {}
    async with await psycopg.AsyncConnection.connect(case.cluster.server.url(case.database)) as conn:
        for first in range(0, jobs, MOST):
            some = numbers[first : first + MOST]
            entries = [{"type": type_of(n), "payload": {"n": n}, "priority": LANE} for n in some]
            cursor = await conn.execute(
                "select job_id::text from taskd.submit_many(%s, wake => true)", [json.dumps(entries)]
            )
            accepted |= zip(some, (row[0] for row in await cursor.fetchall()), strict=True)
    case.tally.accepted |= accepted


async def drain_rate(case: System, jobs: int, type_of: Callable[[int], str]) -> float:
    """Feed a backlog, wait until it has ended, and return jobs a second, from its first start to its end."""
    first = case.tally.next
    await feed(case, jobs, type_of)
    ids = [case.tally.accepted[first], case.tally.accepted[first + jobs - 1]]

    async def ended() -> bool:
        left = await case.ask(f"select exists (select from taskd.queue where priority = {LANE})")
        return not left[0][0]

    try:
        await until(ended, PATIENCE_S, f"a backlog of {jobs} ends", every_s=0.2)
    except AssertionError as error:
        left = await case.ask(
            "select type, priority, claimed, node, count(*), min(run_at), min(started_at) from taskd.queue "
            "group by 1, 2, 3, 4"
        )
        logs = "\n".join(case.words(name) for name in case.units)
        raise AssertionError(f"{error}: {left}\n{logs}") from None
    rows = await case.ask(
        "select count(*), extract(epoch from max(o.finished_at) - min(o.started_at))::float8 "
        "from taskd.outcomes as o join taskd.jobs as j on j.id = o.id "
        f"where j.priority = {LANE} and j.id between '{ids[0]}' and '{ids[1]}'"
    )
    count, seconds = rows[0]
    print(f"{count} in {seconds:.2f} s")
    assert count == jobs, f"{count} of {jobs}"
    return float(count) / float(seconds)
