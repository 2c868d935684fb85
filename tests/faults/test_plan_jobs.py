"""F15, F18 and F19 of the fault plan: jobs that harm the process they run in (`make faults`)."""

from __future__ import annotations

import asyncio
import signal

import pytest

from tests.faults.rig.checker import read_ledger
from tests.faults.rig.cluster import Cluster
from tests.faults.rig.keeper import until
from tests.faults.rig.report import Report, scaled
from tests.faults.rig.system import System, system

pytestmark = pytest.mark.fault

WAYS = ("exit", "abort", "null", "kill", "descriptors")
MAX_CRASHES = 3
TIMEOUT_S, GRACE_S = 5.0, 5.0


async def begin(case: System) -> None:
    case.api()
    case.worker("one")
    await case.ready("one")


async def test_f15_process_killers(durable: Cluster, report: Report) -> None:
    killers, good = round(scaled(500, 20)), round(scaled(20_000, 600))
    async with system(durable, concurrency=32) as case:
        await begin(case)
        supervisor = case.units["one"].main
        every = good // killers

        def body(n: int) -> dict[str, object]:
            if n % (every + 1) == 0:
                number = n // (every + 1)
                kind = "killer" if number % 2 else "killer_sync"
                payload = {"n": n, "how": WAYS[number // 2 % len(WAYS)]}
                return {"type": kind, "payload": payload, "max_attempts": 10}
            return {"type": "ledger", "payload": {"n": n, "ms": 20}}

        async with case.load(body, rate=100, seconds=(killers + good) / 100):
            pass
        await case.quiet(scaled(3600, 240))

        findings = await case.check()
        ended = await case.ask(
            "select o.status, h.cause, count(*), max((select count(*) from taskd.history as c "
            "where c.job_id = o.id and c.cause = 'crashed')) "
            "from taskd.outcomes as o join taskd.jobs as j on j.id = o.id and j.type like 'killer%' "
            "cross join lateral (select cause from taskd.history as l where l.job_id = o.id "
            "order by ended_at desc limit 1) as h group by 1, 2"
        )
        bad = await case.ask(
            "select o.status, count(*) from taskd.outcomes as o join taskd.jobs as j on j.id = o.id "
            "where j.type = 'ledger' group by 1"
        )
        respawns = len(case.logged("child ended", "one"))
        assert [row[:2] for row in ended] == [("failed", "crashed")], ended
        assert ended[0][3] == MAX_CRASHES
        assert [row[0] for row in bad] == ["completed"]
        assert case.units["one"].main == supervisor
        report.add(
            case="F15 process killers",
            load=f"{good} good jobs at 100/s",
            faults=f"{killers} jobs that end their process by {', '.join(WAYS)}",
            counts=findings.counts | {"failed as crashed": ended[0][2], "respawns": respawns},
            worst=f"{ended[0][3]} deaths of one job alone; supervisor unchanged",
            bound=f"{MAX_CRASHES}",
            seed=case.seed,
        )


async def test_f18_jobs_that_ignore_their_end(durable: Cluster, report: Report) -> None:
    async with system(durable) as case:
        await begin(case)
        types = ("stubborn", "deaf", "ledger")

        def body(n: int) -> dict[str, object]:
            payload: dict[str, object] = {"n": n}
            if types[n] == "ledger":
                payload["ms"] = 60_000
            return {
                "type": types[n],
                "payload": payload,
                "timeout": round(TIMEOUT_S),
                "max_attempts": 1,
            }

        late_s = [0.0]

        async def watch() -> None:
            while True:
                rows = await case.ask(
                    "select extract(epoch from clock_timestamp() - heartbeat_at)::float8 from taskd.nodes"
                )
                late_s.append(float(rows[0][0]))
                await asyncio.sleep(0.2)

        watching = asyncio.create_task(watch())
        await case.driver(repeat=True).run(body, rate=1000, seconds=len(types) / 1000)
        await until(lambda: len(read_ledger(case.ledger)) == len(types), 10, "the jobs run")
        frozen = {run.pid for run in read_ledger(case.ledger) if run.job_id == case.tally.accepted[2]}
        for child in case.units["one"].children:
            if child.pid in frozen:
                child.signal(signal.SIGSTOP)
        await case.quiet(30)
        watching.cancel()

        findings = await case.check()
        ends = await case.ask(
            "select cause, max(extract(epoch from ended_at - started_at))::float8 "
            "from taskd.history group by 1"
        )
        causes = {cause for cause, _ in ends}
        longest = max(took for _, took in ends)
        assert "timeout" in causes
        assert causes <= {"timeout", "interrupted"}
        assert longest <= TIMEOUT_S + GRACE_S + 1
        assert max(late_s) <= 1.0 + 1.0, "heartbeats are never late by more than 1 s"
        assert await case.count("taskd.outcomes where status = 'failed'") == len(types)
        async with case.load(lambda n: {"type": "ledger", "payload": {"n": n}}, rate=50, seconds=2):
            pass
        await case.quiet(20)
        report.add(
            case="F18 jobs that ignore their end",
            load=f"{len(types)} jobs with a timeout of {TIMEOUT_S:g} s",
            faults="swallows CancelledError; sleeps in C with all signals blocked; its process is frozen",
            counts=findings.counts,
            worst=f"killed after {longest:.1f} s, heartbeat at most {max(late_s):.1f} s old",
            bound=f"{TIMEOUT_S + GRACE_S + 1:g} s; 1 s late",
            seed=case.seed,
        )


async def test_f19_a_job_that_blocks_its_loop(durable: Cluster, report: Report) -> None:
    seconds = scaled(60, 10)
    async with system(durable, concurrency=4) as case:
        await begin(case)
        node = await case.ask("select max(id) from taskd.nodes")

        def body(n: int) -> dict[str, object]:
            if n == 0:
                return {"type": "busy", "payload": {"n": n, "seconds": seconds}}
            return {"type": "ledger", "payload": {"n": n, "ms": 500}}

        await case.driver(repeat=True).run(body, rate=20, seconds=4 / 20)
        await case.driver(repeat=True).run(body, rate=5, seconds=seconds)
        await case.quiet(seconds + 60)

        findings = await case.check()
        slowest = max(case.tally.seconds)
        assert await case.ask("select max(id) from taskd.nodes") == node, "the lease was kept"
        assert case.logged("lease lost") == []
        assert slowest < 1.0
        report.add(
            case="F19 a job that blocks its loop",
            load="5/s, 2 processes of 2 slots",
            faults=f"an async job that never yields for {seconds:g} s",
            counts=findings.counts,
            worst=f"slowest answer of the API {slowest:.2f} s, 0 leases lost",
            bound="API unaffected, 0",
            seed=case.seed,
        )
