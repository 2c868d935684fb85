"""Daemons that stand still for longer than their lease, and wake up again."""

from __future__ import annotations

import signal

from tests.faults.rig.checker import read_ledger
from tests.faults.rig.cluster import Cluster
from tests.faults.rig.driver import mixed
from tests.faults.rig.keeper import until
from tests.faults.rig.system import System, system

JOBS = 4
JOB_MS = 1500


async def hold_jobs(case: System) -> None:
    """Have node one run `JOBS` jobs, of both kinds."""
    kinds = ["ledger", "ledger", "ledger_sync", "ledger_sync"]

    def body(n: int) -> dict[str, object]:
        return {"type": kinds[n], "payload": {"n": n, "ms": JOB_MS}}

    # Repeated: an API process that has just started may not know of the node's types for a moment.
    await case.driver(repeat=True).run(body, rate=1000, seconds=JOBS / 1000)
    assert len(case.tally.accepted) == JOBS, case.tally
    await until(lambda: len(read_ledger(case.ledger)) == JOBS, 10, "the jobs run", every_s=0.01)


async def test_a_zombie_changes_nothing_is_counted_and_goes_on_as_a_new_incarnation(
    durable: Cluster,
) -> None:
    async with system(durable) as case:
        case.api()
        case.worker("one")
        await case.ready("one")
        await hold_jobs(case)

        case.units["one"].signal_all(signal.SIGSTOP)
        case.worker("two")
        await case.quiet(30)
        finished = await case.ask("select * from taskd.outcomes order by id")
        case.units["one"].signal_all(signal.SIGCONT)
        await until(lambda: case.logged("goes on as a new incarnation", "one"), 10, "node one goes on")

        assert await case.ask("select * from taskd.outcomes order by id") == finished
        winners = await case.ask(
            "select distinct n.name, o.attempts, o.result->>'attempt' from taskd.outcomes as o "
            "join taskd.nodes as n on n.id = o.node"
        )
        assert winners == [("two", 2, "2")]
        await until(
            lambda: sum(line["jobs"] for line in case.logged("late verdicts fenced", "one")) == JOBS,
            5,
            "every late write is fenced and counted",
        )
        async with case.load(mixed(case.seed), rate=50, seconds=2):
            pass
        await case.quiet(20)
        await case.check()
        served = await case.ask(
            "select distinct n.name from taskd.outcomes as o join taskd.nodes as n on n.id = o.node "
            "where n.id > (select max(id) from taskd.nodes where name = 'two')"
        )
        assert served == [("one",)], "the new incarnation runs jobs"


async def test_a_freeze_without_an_heir_costs_no_second_run(durable: Cluster) -> None:
    async with system(durable) as case:
        case.api()
        case.worker("one")
        await case.ready("one")
        await hold_jobs(case)

        case.units["one"].signal_all(signal.SIGSTOP)
        await until(
            lambda: case.query("select 1 from taskd.nodes where lease_until < clock_timestamp()"),
            15,
            "the lease ends",
        )
        case.units["one"].signal_all(signal.SIGCONT)
        await case.quiet(20)

        await case.check()
        assert len(read_ledger(case.ledger)) == JOBS
        assert await case.count("taskd.history") == 0
        assert await case.count("taskd.outcomes where status = 'completed' and attempts = 1") == JOBS
