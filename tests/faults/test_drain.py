"""What a restart of a worker node under load costs: time, and nothing else."""

from __future__ import annotations

import asyncio

from tests.faults.rig.cluster import Cluster
from tests.faults.rig.driver import mixed
from tests.faults.rig.system import system

DRAIN_S = 1


async def test_sigterm_under_load_uses_no_attempt_and_leaves_no_processing_row(durable: Cluster) -> None:
    async with system(durable, drain=DRAIN_S) as case:
        case.api()
        case.worker("one")
        case.worker("two")
        await case.ready("one", "two")
        body = mixed(case.seed, raises=0.0, long=0.05, long_ms=3500)

        async with case.load(body, rate=100, seconds=6):
            await asyncio.sleep(2)
            took, status = await case.units["one"].end()
            left = await case.count(
                "taskd.queue as q join taskd.nodes as n on n.id = q.node where q.claimed and n.name = 'one'"
            )
            state = await case.ask("select state from taskd.nodes where name = 'one'")
            case.units["one"].start()
        await case.quiet(30)

        await case.check()
        causes = dict(await case.ask("select cause, count(*) from taskd.history group by cause"))
        print(f"gone after {took:.2f} s with status {status}; {causes}")
        assert status == 0
        assert took <= DRAIN_S + 10
        assert left == 0
        assert state == [("gone",)]
        assert causes.keys() == {"interrupted"}, "some long job was put back, and nothing was rescued"
        assert await case.count("taskd.outcomes where attempts <> 1") == 0
