"""What happens to taskd when its Postgres goes away, and comes back, and when answers get lost."""

from __future__ import annotations

import asyncio
import time

from tests.faults.rig.cluster import Cluster
from tests.faults.rig.driver import gaps, mixed
from tests.faults.rig.system import system

RATE = 120
BACK_S = 5.0
"""First 2xx after Postgres takes connections again (P10)."""
CLAIM_S = 6.0
"""First claim after that (P11)."""


async def test_immediate_restarts_of_postgres_lose_nothing_and_service_is_back_in_time(
    durable: Cluster,
) -> None:
    async with system(durable) as case:
        case.api()
        case.worker("one")
        case.worker("two")
        await case.ready("one", "two")
        daemons = {name: unit.main for name, unit in case.units.items()}
        backs: list[float] = []
        back_at: list[float] = []

        async with case.load(mixed(case.seed), rate=RATE, seconds=12):
            for _ in range(3):
                await asyncio.sleep(3)
                await durable.restart_immediate()
                backs.append(time.monotonic())
                back_at.append(time.time())
        await case.quiet(30)

        findings = await case.check()
        claims = await case.ask("select extract(epoch from started_at)::float8 from taskd.outcomes")
        first_2xx = max(gaps(case.tally.accepted_at, backs))
        first_claim = max(gaps([float(at) for (at,) in claims], back_at))
        print(f"first 2xx {first_2xx:.2f} s, first claim {first_claim:.2f} s after; {findings.counts}")
        assert set(case.tally.statuses) <= {200, 503}
        assert first_2xx <= BACK_S
        assert first_claim <= CLAIM_S
        assert {name: unit.main for name, unit in case.units.items()} == daemons, "a daemon ended"


async def test_an_answer_cut_after_the_commit_and_repeated_with_its_unique_key_makes_one_job(
    durable: Cluster,
) -> None:
    async with system(durable, through_proxy=True) as case:
        case.api()
        case.worker("one")
        await case.ready("one")
        assert case.proxy is not None
        case.proxy.cut_after_commit("taskd.insert_jobs", share=0.5)

        async with case.load(mixed(case.seed), rate=50, seconds=4, repeat=True, connections=32):
            pass
        case.proxy.pass_()
        await case.quiet(30)

        await case.check()
        print(f"{case.proxy.cuts} answers cut")
        assert case.proxy.cuts >= 5
        assert len(case.tally.accepted) == len(case.tally.sent) == await case.count("taskd.jobs")
        assert 500 not in case.tally.statuses


async def test_answers_to_claims_and_verdicts_that_get_lost_cost_neither_a_job_nor_an_attempt(
    durable: Cluster,
) -> None:
    async with system(durable, through_proxy=True) as case:
        case.api()
        case.worker("one")
        await case.ready("one")
        assert case.proxy is not None

        async with case.load(mixed(case.seed, raises=0.0), rate=60, seconds=9):
            for statement in ("taskd.claim(", "taskd.settle_completed("):
                case.proxy.cut_after_commit(statement, share=0.1)
                await asyncio.sleep(4)
            case.proxy.pass_()
        await case.quiet(30)

        await case.check()
        print(f"{case.proxy.cuts} answers cut")
        assert case.proxy.cuts >= 2
        assert await case.count("taskd.history") == 0
        assert case.logged("late verdicts fenced") == []
