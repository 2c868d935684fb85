"""A daemon that was killed and starts again on its host: what it left is killed, its jobs are ready again."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from tests.faults.rig.checker import read_ledger
from tests.faults.rig.cluster import Cluster
from tests.faults.rig.keeper import until
from tests.faults.rig.system import System, system

READY_S = 2.0
"""From the start of the daemon to the moment at which its earlier self's jobs are ready again (P5)."""
ROUNDS = 2
LEASE_S = 30.0
"""Far above what a restart may take: no rescue by the lease can pass for one by the restart."""


def living(mark: str) -> list[int]:
    """Return the processes that `leaver` started with this argument."""
    wanted = f"/bin/sleep\0{mark}\0".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                if (entry / "cmdline").read_bytes() == wanted:
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


async def one_round(case: System, number: int) -> tuple[float, float]:
    """Kill the daemon in the middle of jobs; return when the last was ready, and when what was left died.

    Both in seconds since the daemon's next start.
    """
    mark = f"{800_000 + case.seed % 90_000}.{number}"
    first = case.tally.next

    def body(n: int) -> dict[str, object]:
        if n == first:
            return {"type": "leaver", "payload": {"n": n, "mark": mark, "ms": 60_000}}
        return {"type": "ledger", "payload": {"n": n, "ms": 4000}}

    await case.driver().run(body, rate=100, seconds=0.08)
    held = case.tally.next - first
    unit = case.units["one"]
    await until(lambda: living(mark), 10, "the process that will be left is there")
    mine = set(list(case.tally.accepted.values())[first:])
    await until(
        lambda: mine <= {run.job_id for run in read_ledger(case.ledger)}, 10, lambda: f"all {held} run"
    )
    starts = unit.starts
    killed_at = unit.kill()
    assert living(mark), "it outlives the daemon"

    await until(lambda: len(unit.started_at) > starts, 10, "the daemon starts again")
    started_at = unit.started_at[-1]
    await until(lambda: not living(mark), READY_S + 1, "what was left is killed")
    gone_s = time.time() - started_at
    await case.quiet(30)

    ends = await case.ended_after(killed_at, "lease_expired")
    rows = await case.ask(
        "select min(extract(epoch from ended_at))::float8, max(extract(epoch from ended_at))::float8 "
        f"from taskd.history where cause = 'lease_expired' and ended_at > to_timestamp({killed_at!r})"
    )
    assert len(ends) == held, "each job that ran was taken from the daemon that was killed"
    second = [run for run in read_ledger(case.ledger) if run.attempt == 2 and run.started_at > killed_at]
    assert min(run.started_at for run in second) >= rows[0][0]
    return float(rows[0][1]) - started_at, gone_s


async def test_a_daemon_killed_and_started_again_has_its_jobs_ready_within_two_seconds_and_kills_what_it_left(
    durable: Cluster,
) -> None:
    async with system(durable, lease_s=LEASE_S, heartbeat_s=3, sweep_s=5) as case:
        case.api()
        case.worker("one")
        await case.ready("one")
        ready: list[float] = []
        gone: list[float] = []

        for number in range(ROUNDS):
            ready_s, gone_s = await one_round(case, number)
            ready.append(ready_s)
            gone.append(gone_s)
            await asyncio.sleep(0)

        await case.check()
        print(f"ready again {max(ready):.2f} s after the start, what was left gone after {max(gone):.2f} s")
        assert max(ready) <= READY_S
        assert max(gone) <= READY_S
