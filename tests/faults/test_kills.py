"""What kill -9 of any part of taskd may cost: nothing that was accepted, no run without a cause."""

from __future__ import annotations

import asyncio
import signal
import time
from contextlib import AbstractAsyncContextManager

from tests.faults.rig.cluster import Cluster
from tests.faults.rig.driver import mixed
from tests.faults.rig.keeper import Process, until
from tests.faults.rig.system import System, system

RATE = 150
SECONDS = 6.0
CHILD_S = 2.0
"""A dead job process has its jobs ready again within this (P5)."""


def two_nodes(durable: Cluster) -> AbstractAsyncContextManager[System]:
    return system(durable)


async def started(case: System) -> System:
    case.api()
    case.worker("one")
    case.worker("two")
    await case.ready("one", "two")
    return case


def gone(processes: list[Process]) -> bool:
    return not any(one.alive for one in processes)


async def test_kill_of_a_job_process_has_its_jobs_ready_again_within_two_seconds(durable: Cluster) -> None:
    async with two_nodes(durable) as case:
        await started(case)
        supervisor = case.units["one"].main
        kills: list[float] = []

        async with case.load(mixed(case.seed), rate=RATE, seconds=SECONDS) as driver:
            while not driver.ended:
                await asyncio.sleep(0.7)
                victim = case.dice.choice(case.units["one"].children)
                kills.append(time.time())
                victim.signal(signal.SIGKILL)
        await case.quiet(30)

        await case.check()
        ends = await case.ended_after(kills[0], "crashed", "interrupted")
        after = [min(kills[0] + end - kill for kill in kills if kill <= kills[0] + end) for end in ends]
        assert ends, "no kill met a running job"
        assert max(after) <= CHILD_S
        assert case.units["one"].main == supervisor


async def test_kill_of_a_supervisor_takes_its_jobs_processes_along_and_others_finish_its_jobs(
    durable: Cluster,
) -> None:
    async with two_nodes(durable) as case:
        await started(case)

        async with case.load(mixed(case.seed), rate=RATE, seconds=SECONDS):
            await asyncio.sleep(3)
            family = case.units["one"].processes
            killed_at = case.units["one"].kill()
            took = await until(lambda: gone(family), 2.0, "the children die with their supervisor")
        await case.quiet(30)

        findings = await case.check()
        ends = await case.ended_after(killed_at, "lease_expired")
        assert ends, "the kill met no claimed job"
        assert max(ends) <= case.lease_s + case.sweep_s + 1
        assert case.units["one"].starts == 2
        print(f"children gone after {took:.2f} s, rescued after {max(ends):.2f} s, {findings.counts}")


async def test_kill_of_an_api_process_loses_nothing_and_it_is_started_again(durable: Cluster) -> None:
    async with two_nodes(durable) as case:
        await started(case)
        parent = case.units["api"].main

        async with case.load(mixed(case.seed), rate=RATE, seconds=SECONDS) as driver:
            while not driver.ended:
                await asyncio.sleep(1.5)
                case.dice.choice(case.units["api"].children).signal(signal.SIGKILL)
        await case.quiet(30)

        await case.check()
        assert case.units["api"].main == parent
        await until(lambda: len(case.units["api"].children) == 2, 5.0, "the API has its two processes again")
        assert len(case.tally.accepted) > RATE * SECONDS * 0.9


async def test_kill_of_the_api_parent_loses_nothing_and_leaves_no_process(durable: Cluster) -> None:
    async with two_nodes(durable) as case:
        await started(case)

        async with case.load(mixed(case.seed), rate=RATE, seconds=SECONDS):
            await asyncio.sleep(2)
            family = case.units["api"].processes
            case.units["api"].kill()
            await until(lambda: gone(family), 2.0, "the serving processes die with their parent")
        await case.quiet(30)

        await case.check()
        assert case.units["api"].starts == 2
        assert case.tally.accepted_at[-1] > case.tally.accepted_at[0] + 4, "the API came back"


async def test_kill_of_everything_at_once_leaves_no_process_and_loses_nothing(durable: Cluster) -> None:
    async with two_nodes(durable) as case:
        await started(case)

        async with case.load(mixed(case.seed), rate=RATE, seconds=SECONDS):
            for _ in range(2):
                await asyncio.sleep(2.5)
                family = [one for unit in case.units.values() for one in unit.processes]
                for unit in case.units.values():
                    if unit.running:
                        unit.kill()
                await until(lambda seen=family: gone(seen), 2.0, "no orphan is left")  # type: ignore[misc]
        # Nobody was left to rescue: the lease, and two sweeps of the node that has just started, too.
        took = await case.quiet(case.lease_s + 3 * case.sweep_s + 20)

        findings = await case.check()
        print(f"quiet {took:.2f} s after the last submit, {findings.counts}")
