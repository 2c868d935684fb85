"""F30 and F32 of the fault plan: PgBouncer before the server, a NOTIFY queue that fills (`make faults`)."""

from __future__ import annotations

import asyncio
import time

import psycopg
import pytest

from tests.faults.rig.checker import read_ledger
from tests.faults.rig.cluster import Cluster, cluster
from tests.faults.rig.driver import mixed
from tests.faults.rig.keeper import until
from tests.faults.rig.pooler import POOL, pooler, program
from tests.faults.rig.report import Report, scaled
from tests.faults.rig.system import System, system

pytestmark = pytest.mark.fault

START_S = 1.5
"""Submit to start where no hint comes: the poll of 1 s and a way."""
ALARM = 0.1
SEEN_S = 15.0
"""How long a figure of the server may take to show: they are looked at every 10 s."""
BULK = 1000


async def start_latencies(case: System, jobs: int, every_s: float = 0.4) -> list[float]:
    """Submit jobs one after the other to an idle node and return how long each took to start, in order."""
    begun: dict[str, float] = {}
    driver = case.driver()
    for _ in range(jobs):
        n = case.tally.next
        sent_at = time.clock_gettime(time.CLOCK_BOOTTIME)
        await driver.run(
            lambda n: {"type": "ledger", "payload": {"n": n, "ms": 1}},
            rate=1000,
            seconds=0.001,
            connections=1,
        )
        begun[case.tally.accepted[n]] = sent_at
        await asyncio.sleep(every_s * case.dice.uniform(0.5, 1.5))
    await case.quiet(20)
    found = {run.job_id: run.started for run in read_ledger(case.ledger)}
    return [found[job_id] - sent_at for job_id, sent_at in begun.items()]


@pytest.mark.skipif(program() is None, reason="PgBouncer is not installed")
@pytest.mark.parametrize("listens", [False, True], ids=["polls", "listens"])
async def test_f30_pgbouncer_in_transaction_mode(durable: Cluster, report: Report, listens: bool) -> None:
    seconds, jobs = scaled(60, 8), round(scaled(100, 15))
    rate, nodes = 100, ("one", "two")
    async with system(durable) as case, pooler(durable) as between:
        url = between.url(case.database)
        direct = f'\n  listen_url: "{durable.server.url(case.database)}' if listens else ""
        # The URL stands in quotes; what listens goes past the pooler.
        settings = {"url": url + (f'"{direct}' if listens else "")}
        case.api(**settings)
        for node in nodes:
            case.worker(node, **settings)
        await case.ready(*nodes)
        held: list[object] = []

        async with case.load(mixed(case.seed), rate=rate, seconds=seconds) as driver:
            while not driver.ended:
                held += await case.ask(
                    "select a.application_name, l.objid "
                    "from pg_locks as l join pg_stat_activity as a using (pid) "
                    "where l.locktype = 'advisory' and l.granted and a.state = 'idle' "
                    "and a.datname = current_database()"
                )
                await asyncio.sleep(0.2)
        await case.quiet(60)
        loaded = await case.count("taskd.jobs")
        latencies = await start_latencies(case, jobs)
        servers = await case.count(
            f"pg_stat_activity where datname = '{case.database}' and backend_type = 'client backend' "
            "and application_name not like 'taskd heart%' and application_name not like 'taskd api ears%' "
            "and pid <> pg_backend_pid()"
        )

        findings = await case.check()
        logs = "\n".join(unit.log.read_text(errors="replace") for unit in case.units.values())
        assert set(case.tally.statuses) == {200}
        assert "prepared statement" not in logs
        assert "prepared statement" not in between.log
        assert held == [], "advisory locks are held over statements"
        assert servers <= POOL
        assert max(latencies) <= START_S
        hears = [(await case.figures(node))["taskd_listener_up"] for node in nodes]
        assert hears == [listens] * len(nodes)
        how = "LISTEN past it (database.listen_url)" if listens else "no LISTEN: polling"
        report.add(
            case=f"F30 pooler, {'listens' if listens else 'polls'}",
            load=f"{rate}/s, {loaded} jobs; then {jobs} single ones on an idle system",
            faults=f"PgBouncer {between.version} in transaction mode, {POOL} server connections; {how}",
            counts=findings.counts | {"advisory locks held": len(held), "server connections": servers},
            worst=f"submit to start {max(latencies):.3f} s, median {sorted(latencies)[jobs // 2]:.3f} s",
            bound=f"no prepared-statement error, {START_S:g} s, 0 advisory locks",
            seed=case.seed,
        )


async def usage(case: System) -> float:
    return float((await case.ask("select pg_notification_queue_usage()"))[0][0])


async def flood(case: System, share: float, batch: int) -> None:
    """Have other traffic fill the NOTIFY queue up to this share, or until it refuses more."""
    async with await psycopg.AsyncConnection.connect(
        case.cluster.server.url(case.database), autocommit=True
    ) as conn:
        while await usage(case) < share:
            try:
                # One a page: a notification holds nearly 8000 bytes, and equal ones are sent once.
                await conn.execute(
                    "select pg_notify('elsewhere', rpad(g::text, 7900, 'x')) "
                    "from generate_series(1, %s) as g",
                    [batch],
                )
            except psycopg.errors.ProgramLimitExceeded:
                return


async def submit_bulks(case: System, jobs: int) -> float:
    """Submit so many jobs, `BULK` at a time; returns the seconds that the slowest took."""
    slowest = 0.0
    for _ in range(max(1, jobs // BULK)):
        numbers = range(case.tally.next, case.tally.next + BULK)
        case.tally.next += BULK
        case.tally.sent.update(numbers)
        began = time.monotonic()
        status, answer = await case.request(
            "POST",
            "/jobs/bulk",
            {"jobs": [{"type": "noop", "payload": {"n": n}, "priority": n % 50} for n in numbers]},
            key=True,
        )
        slowest = max(slowest, time.monotonic() - began)
        case.tally.statuses[status] += 1
        assert status == 200, answer
        case.tally.accepted |= zip(numbers, (str(job["job_id"]) for job in answer["jobs"]), strict=True)
    return slowest


async def seen(case: System, wanted: bool) -> float:
    """Wait until the node's figure says that the queue is in use, or no longer; returns the seconds."""

    async def shown() -> bool:
        return ((await case.figures("one"))["taskd_notify_queue_usage"] >= ALARM) == wanted

    return await until(shown, SEEN_S, f"usage {'at' if wanted else 'below'} {ALARM:g} is shown", every_s=0.2)


async def test_f32_notify_queue(report: Report) -> None:
    """Where the queue can be made small (PostgreSQL 17) it is filled to the end as well."""
    small = int(report.postgres.split(".")[0]) >= 17
    settings = ["max_notify_queue_pages=64"] if small else []
    batch = 1 if small else 5000
    jobs = round(scaled(1_000_000, 20_000))
    with cluster(*settings) as made:
        async with system(made, concurrency=200) as case:
            case.api()
            case.worker("one")
            await case.ready("one")
            idle = await psycopg.AsyncConnection.connect(made.server.url(case.database))
            async with idle:
                await idle.execute("listen taskd")
                await idle.commit()
                await idle.execute("select 1")  # and stays in its transaction

                slowest = await submit_bulks(case, jobs // 2)
                by_jobs = await usage(case)
                await flood(case, 1.2 * ALARM, batch)
                told_s = await seen(case, True)
                slowest = max(slowest, await submit_bulks(case, jobs // 2))
                if small:
                    await flood(case, 2.0, batch)
                most = await usage(case)
                latencies = await start_latencies(case, 10)
                still = (await case.figures("one"))["taskd_notify_queue_usage"]
                await idle.rollback()
            gone_s = await seen(case, False)
            await case.quiet(120)

            findings = await case.check()
            assert set(case.tally.statuses) == {200}
            assert case.logged("Task exception was never retrieved") == []
            assert max(latencies) <= START_S
            assert still >= ALARM
            full = " until it refuses more" if small else ""
            shown = f"{most:.0%} at most ({by_jobs:.1%} by the jobs alone)"
            report.add(
                case="F32 notify queue",
                load=f"{jobs} jobs in bulks of {BULK}, then single ones",
                faults=f"a listener idle in its transaction; other traffic fills the queue{full}",
                counts=findings.counts | {"answers that are no 2xx": 0},
                worst=f"usage {shown}, told after {told_s:.1f} s, gone after {gone_s:.1f} s; "
                f"slowest bulk {slowest:.2f} s; submit to start {max(latencies):.2f} s",
                bound=f"submits don't fail; {ALARM:.0%} is shown within {SEEN_S:g} s; start {START_S:g} s",
                seed=case.seed,
            )
