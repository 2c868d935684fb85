"""F12 and F13 of the fault plan: daemons that stand still, many rounds (`make faults`)."""

from __future__ import annotations

import signal

import pytest

from tests.faults.rig.checker import read_ledger
from tests.faults.rig.cluster import Cluster
from tests.faults.rig.driver import Body
from tests.faults.rig.keeper import until
from tests.faults.rig.report import Report, scaled
from tests.faults.rig.system import System, system

pytestmark = pytest.mark.fault

JOBS, JOB_MS = 4, 1500
HEARTBEAT_S = 1.5


def body() -> Body:
    """Return jobs of both kinds that take a while."""
    return lambda n: {"type": ("ledger", "ledger_sync")[n % 2], "payload": {"n": n, "ms": JOB_MS}}


async def hold_jobs(case: System) -> None:
    """Have the nodes that live run `JOBS` more jobs."""
    before = len(read_ledger(case.ledger))
    await case.driver(repeat=True).run(body(), rate=1000, seconds=JOBS / 1000)
    await until(lambda: len(read_ledger(case.ledger)) >= before + JOBS, 20, "the jobs run", every_s=0.01)


def fenced(case: System, node: str) -> int:
    return sum(line["jobs"] for line in case.logged("late verdicts fenced", node))


async def test_f12_zombies(durable: Cluster, report: Report) -> None:
    """Every second round the proxy makes the verdicts of node one late; else it wakes up with its jobs."""
    rounds = round(scaled(50, 4))
    async with system(durable, through_proxy=True, heartbeat_s=HEARTBEAT_S) as case:
        assert case.proxy is not None
        case.api()
        case.worker("one")
        await case.ready("one")
        case.worker("two", url=durable.server.url(case.database))
        await case.lives("two")
        late = 0
        for number in range(rounds):
            held_back = number % 2 == 1
            if held_back:
                case.proxy.hold("taskd.settle_completed")
            await hold_jobs(case)
            seen = case.proxy.holding
            held = await case.count(
                "taskd.queue as q join taskd.nodes as n on n.id = q.node where q.claimed and n.name = 'one'"
            )
            if held_back and held:
                await until(lambda seen=seen: case.proxy.holding > seen, 10, "a verdict is held back")  # type: ignore[misc]
            stopped = case.units["one"].signal_all(signal.SIGSTOP)
            await until(
                lambda: case.query(
                    "select 1 from taskd.nodes where state = 'dead' "
                    "and id = (select max(id) from taskd.nodes where name = 'one')"
                ),
                30,
                "node one is given up",
            )
            await case.quiet(40)
            finished = await case.ask("select * from taskd.outcomes order by id")
            lives = len(case.logged("goes on as a new incarnation", "one"))
            case.proxy.pass_()
            for one in stopped:
                one.signal(signal.SIGCONT)
            await until(
                lambda seen=lives: len(case.logged("goes on as a new incarnation", "one")) > seen,  # type: ignore[misc]
                20,
                "node one goes on as a new incarnation",
            )
            late += held
            await until(lambda want=late: fenced(case, "one") >= want, 10, "late writes are counted")  # type: ignore[misc]
            assert await case.ask("select * from taskd.outcomes order by id") == finished

        findings = await case.check()
        assert fenced(case, "one") == late
        report.add(
            case="F12 zombies",
            load=f"{JOBS} jobs of {JOB_MS / 1000:g} s a round on two nodes",
            faults=f"{rounds} × one node stopped for longer than its lease of {case.lease_s:g} s",
            counts=findings.counts | {"late writes": late, "fenced": fenced(case, "one")},
            worst="0 rows changed",
            bound="0; every late write counted",
            seed=case.seed,
        )


async def test_f13_freeze_without_an_heir(durable: Cluster, report: Report) -> None:
    rounds = round(scaled(20, 3))
    async with system(durable, heartbeat_s=HEARTBEAT_S) as case:
        case.api()
        case.worker("one")
        await case.ready("one")
        for _ in range(rounds):
            await hold_jobs(case)
            case.units["one"].signal_all(signal.SIGSTOP)
            await until(
                lambda: case.query("select 1 from taskd.nodes where lease_until < clock_timestamp()"),
                15,
                "the lease ends",
            )
            case.units["one"].signal_all(signal.SIGCONT)
            await case.quiet(30)

        findings = await case.check()
        assert findings.counts["second_runs"] == 0
        assert await case.count("taskd.outcomes where status = 'completed' and attempts = 1") == JOBS * rounds
        report.add(
            case="F13 freeze without an heir",
            load=f"{JOBS} jobs of {JOB_MS / 1000:g} s a round",
            faults=f"{rounds} × the only node stopped until its lease has ended",
            counts=findings.counts,
            worst="0 second runs",
            bound="0",
            seed=case.seed,
        )
