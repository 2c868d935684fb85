"""F1 to F3 of the fault plan: kills and restarts of taskd's own processes, at length (`make faults`)."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter

import pytest

from tests.faults.rig.checker import grown
from tests.faults.rig.cluster import Cluster
from tests.faults.rig.driver import mixed
from tests.faults.rig.keeper import Process, Resources, resources, until
from tests.faults.rig.report import Report, scaled
from tests.faults.rig.system import System, system

pytestmark = pytest.mark.fault

RATE = 200
LEASE_S, SWEEP_S, HEARTBEAT_S = 30.0, 5.0, 3.0
RESCUE_S = LEASE_S + SWEEP_S + 1
CHILD_S = 2.0
QUIET_S = 60.0
VICTIMS = ("job process", "supervisor", "API process", "API parent", "backend")
LOAD = f"{RATE}/s over 16 connections, 2 nodes of 2 processes, jobs of 20 to 200 ms, 5 % raise, 1 % run 5 s"


def gone(processes: list[Process]) -> bool:
    return not any(one.alive for one in processes)


async def kill_one(case: System, what: str, deaths: dict[int, float]) -> bool:
    """Kill one process of a kind; notes when which supervisor died. False when there was none."""
    name = case.dice.choice(("one", "two")) if what in ("job process", "supervisor") else "api"
    unit = case.units[name]
    if what == "backend":
        return await case.cluster.kill_backend(case.database, "taskd%")
    if not unit.running:
        return False
    if what in ("supervisor", "API parent"):
        deaths[unit.pid] = unit.kill()
        return True
    below = unit.children
    return bool(below) and case.dice.choice(below).signal(signal.SIGKILL)


async def rescues(case: System, deaths: dict[int, float]) -> list[float]:
    """Return how long after the death of its supervisor each lost run was given back."""
    rows = await case.ask(
        "select n.pid, extract(epoch from h.ended_at)::float8 from taskd.history as h "
        "join taskd.nodes as n on n.id = h.node where h.cause = 'lease_expired'"
    )
    return [float(at) - deaths[pid] for pid, at in rows if pid in deaths]


def measure(case: System) -> dict[int, Resources]:
    found = {one.pid: resources(one.pid) for unit in case.units.values() for one in unit.processes}
    return {pid: what for pid, what in found.items() if what is not None}


async def test_f1_random_kills(durable: Cluster, report: Report) -> None:
    seconds = scaled(300, 20)
    async with system(
        durable, lease_s=LEASE_S, sweep_s=SWEEP_S, heartbeat_s=HEARTBEAT_S, concurrency=32, drain=30
    ) as case:
        case.api()
        case.worker("one")
        case.worker("two")
        await case.ready("one", "two")
        deaths: dict[int, float] = {}
        kills: Counter[str] = Counter()
        in_flight = 0

        async with case.load(mixed(case.seed, long=0.01), rate=RATE, seconds=seconds) as driver:
            while not driver.ended:
                await asyncio.sleep(2)
                what = case.dice.choice(VICTIMS)
                try:
                    in_flight += await case.count("taskd.queue where claimed")
                    kills[what] += await kill_one(case, what, deaths)
                except OSError:
                    continue
        quiet_s = await case.quiet(QUIET_S)

        findings = await case.check()
        rescued = max(await rescues(case, deaths), default=0.0)
        again = await case.count("taskd.history where cause <> 'error'")
        assert again <= in_flight
        assert rescued <= RESCUE_S + 2 * SWEEP_S, "two sweeps more: the database had outages, too"
        report.add(
            case="F1 random kills",
            load=f"{LOAD}, {seconds:g} s",
            faults=", ".join(f"{count} × {what}" for what, count in sorted(kills.items())),
            counts=findings.counts | {"runs lost to kills": again, "in flight at kills": in_flight},
            worst=f"rescue {rescued:.1f} s, quiet after {quiet_s:.1f} s",
            bound=f"rescue {RESCUE_S:g} s (two sweeps more after an outage), quiet {QUIET_S:g} s",
            seed=case.seed,
        )


async def test_f1_without_faults_nothing_runs_twice_and_nothing_grows(
    durable: Cluster, report: Report
) -> None:
    seconds = scaled(500, 20)
    async with system(durable, concurrency=32) as case:
        case.api()
        case.worker("one")
        case.worker("two")
        await case.ready("one", "two")
        async with case.load(mixed(case.seed, raises=0.0), rate=RATE, seconds=10):
            pass
        before = measure(case)

        async with case.load(mixed(case.seed, raises=0.0), rate=RATE, seconds=seconds):
            pass
        await case.quiet(30)

        findings = await case.check()
        assert findings.counts["second_runs"] == 0
        assert await case.count("taskd.history") == 0
        assert grown(before, measure(case)) == []
        report.add(
            case="F1 without faults",
            load=f"{RATE}/s, {seconds:g} s",
            faults="none",
            counts=findings.counts,
            worst="0 second runs",
            bound="0",
            seed=case.seed,
        )


async def test_f2_all_at_once(durable: Cluster, report: Report) -> None:
    rounds = round(scaled(30, 2))
    async with system(durable, concurrency=32) as case:
        case.api()
        case.worker("one")
        case.worker("two")
        await case.ready("one", "two")
        deaths: dict[int, float] = {}
        orphans: list[float] = []
        round_s = case.lease_s + 3 * case.sweep_s + 5

        async with case.load(mixed(case.seed), rate=100, seconds=rounds * round_s):
            for _ in range(rounds):
                await asyncio.sleep(round_s - 2)
                family = [one for unit in case.units.values() for one in unit.processes]
                for unit in case.units.values():
                    if unit.running:
                        deaths[unit.pid] = unit.kill()
                orphans.append(
                    await until(lambda seen=family: gone(seen), 2.0, "no orphan is left")  # type: ignore[misc]
                )
        await case.quiet(QUIET_S)

        findings = await case.check()
        rescued = max(await rescues(case, deaths), default=0.0)
        bound = case.lease_s + 3 * case.sweep_s + 1
        assert rescued <= bound
        report.add(
            case="F2 all at once",
            load="100/s over 16 connections",
            faults=f"{rounds} × kill -9 of every supervisor and API parent",
            counts=findings.counts,
            worst=f"last process gone {max(orphans):.2f} s after, rescue {rescued:.1f} s",
            bound=f"gone 2 s; rescue {bound:g} s (lease {case.lease_s:g} s, the rescuer has just started)",
            seed=case.seed,
        )


async def test_f3_rolling_sigterm(durable: Cluster, report: Report) -> None:
    seconds = scaled(600, 40)
    long_ms = 20_000
    async with system(durable, lease_s=LEASE_S, sweep_s=SWEEP_S, heartbeat_s=HEARTBEAT_S, drain=30) as case:
        case.api()
        case.worker("one", concurrency=200)
        case.worker("two", concurrency=200)
        await case.ready("one", "two")
        exits: list[float] = []
        body = mixed(case.seed, raises=0.0, long=0.1, long_ms=long_ms, sync=0.05)

        async with case.load(body, rate=30, seconds=seconds) as driver:
            turn = 0
            while not driver.ended:
                await asyncio.sleep(3)
                unit = case.units[("one", "two", "api")[turn % 3]]
                turn += 1
                took, status = await unit.end()
                exits.append(took)
                assert status == 0, case.words(unit.name)
                unit.start()
                if unit.name != "api":
                    await until(lambda seen=unit: seen.running, 10, "it is started again")  # type: ignore[misc]
                    await case.lives(unit.name)
        await case.quiet(QUIET_S)

        findings = await case.check()
        causes = dict(await case.ask("select cause, count(*) from taskd.history group by cause"))
        assert set(case.tally.statuses) <= {200, 503}
        assert causes.keys() <= {"interrupted"}
        assert await case.count("taskd.outcomes where attempts <> 1") == 0
        assert max(exits) <= 40
        report.add(
            case="F3 rolling SIGTERM",
            load=f"30/s, 10 % run {long_ms / 1000:g} s, {seconds:g} s",
            faults=f"{len(exits)} × SIGTERM, node, node, API in turn",
            counts=findings.counts | {"put back": causes.get("interrupted", 0)},
            worst=f"exit after {max(exits):.1f} s",
            bound="40 s, no attempt used, no rescue",
            seed=case.seed,
        )
