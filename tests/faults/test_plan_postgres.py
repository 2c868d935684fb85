"""F4 to F9 and F22 to F24 of the fault plan: a bad Postgres, a bad network, at length (`make faults`)."""

from __future__ import annotations

import asyncio
import time

import psycopg
import pytest

from tests.faults.rig.checker import read_ledger
from tests.faults.rig.cluster import Cluster, cluster
from tests.faults.rig.driver import Body, gaps, mixed
from tests.faults.rig.keeper import until
from tests.faults.rig.report import Report, scaled
from tests.faults.rig.system import System, system

pytestmark = pytest.mark.fault

RATE = 200
ANSWER_S = 5.0
BACK_S, CLAIM_S = 5.0, 6.0


async def begin(case: System, *nodes: str) -> System:
    case.api()
    for node in nodes:
        case.worker(node)
    await case.ready(*nodes)
    return case


def fixed(ms: int) -> Body:
    """Return jobs that all take the same time."""
    return lambda n: {"type": "ledger", "payload": {"n": n, "ms": ms}}


async def first_claim_s(case: System, back_at: list[float]) -> float:
    """Return the longest time from a return of the database to the next claim."""
    rows = await case.ask("select extract(epoch from started_at)::float8 from taskd.outcomes")
    return max(gaps([float(at) for (at,) in rows], back_at))


async def connections(case: System) -> int:
    return await case.count(
        f"pg_stat_activity where application_name like 'taskd%' and datname = '{case.database}'"
    )


@pytest.mark.parametrize("kill", [False, True], ids=["F4", "F5"])
async def test_f4_f5_postgres_dies(durable: Cluster, report: Report, kill: bool) -> None:
    rounds = round(scaled(20, 3))
    every_s = scaled(15, 6)
    async with system(durable, concurrency=32) as case:
        await begin(case, "one", "two")
        backs: list[float] = []
        back_at: list[float] = []

        load = case.load(
            mixed(case.seed), rate=RATE, seconds=rounds * every_s, connections=32 if kill else 16
        )
        async with load:
            for _ in range(rounds):
                await asyncio.sleep(every_s - 2)
                await (durable.kill() if kill else durable.stop_immediate())
                await durable.start()
                backs.append(time.monotonic())
                back_at.append(time.time())
        await case.quiet(60)

        findings = await case.check()
        first_2xx = max(gaps(case.tally.accepted_at, backs))
        first_claim = await first_claim_s(case, back_at)
        assert set(case.tally.statuses) <= {200, 503}
        assert first_2xx <= BACK_S
        assert first_claim <= CLAIM_S
        report.add(
            case="F5 kill -9 of the postmaster" if kill else "F4 immediate stop of Postgres",
            load=f"{RATE}/s over {32 if kill else 16} connections, {rounds * every_s:g} s",
            faults=f"{rounds} ×; the operating system's cache is not dropped",
            counts=findings.counts,
            worst=f"first 2xx {first_2xx:.2f} s, first claim {first_claim:.2f} s after the return",
            bound=f"{BACK_S:g} s, {CLAIM_S:g} s",
            seed=case.seed,
        )


async def test_f5_unsafe_commits_stop_the_start(durable: Cluster, report: Report) -> None:
    async with system(durable) as case:
        durable.query("postgres", f"alter database {case.database} set synchronous_commit = off")
        api, worker = case.api(), case.worker("one")

        await until(lambda: api.exits and worker.exits, 30, "both refuse to start")

        assert 0 not in (*api.exits, *worker.exits)
        for unit in ("api", "one"):
            assert "synchronous_commit" in case.words(unit)
        report.add(
            case="F5 unsafe commits",
            load="none",
            faults="synchronous_commit = off",
            counts={},
            worst=f"API ends with {api.exits[0]}, worker with {worker.exits[0]}",
            bound="neither starts",
            seed=case.seed,
        )


async def test_f6_long_outage(durable: Cluster, report: Report) -> None:
    lease_s = scaled(30, 8)
    outage_s = 4 * lease_s
    short_s, long_s, short, long = lease_s / 3, 3 * lease_s, 8, 4
    async with system(durable, lease_s=lease_s, heartbeat_s=lease_s / 10, sweep_s=lease_s / 6) as case:
        await begin(case, "one")
        ms = [short_s * 1000] * short + [long_s * 1000] * long

        def held(n: int) -> dict[str, object]:
            return {"type": "ledger", "payload": {"n": n, "ms": round(ms[n]) if n < len(ms) else 20}}

        await case.driver(repeat=True).run(held, rate=1000, seconds=len(ms) / 1000)
        await until(lambda: len(read_ledger(case.ledger)) == len(ms), 20, "the jobs run")
        lines = len(case.logged("", "one"))
        await durable.stop_immediate()
        stopped = time.clock_gettime(time.CLOCK_BOOTTIME)
        answers = len(case.tally.seconds)
        await case.driver().run(held, rate=5, seconds=outage_s, connections=40)
        written = len(case.logged("", "one")) - lines
        slowest = max(case.tally.seconds[answers:])
        await durable.start()
        await case.quiet(2 * long_s + 60)

        findings = await case.check()
        runs = read_ledger(case.ledger)
        longs = [run for run in runs if case.tally.accepted.get(len(ms) - 1) == run.job_id]
        again = await case.ask(
            "select distinct h.cause from taskd.history as h join taskd.jobs as j on j.id = h.job_id "
            f"where (j.payload->>'ms')::integer = {round(short_s * 1000)}"
        )
        causes = await case.ask(
            "select h.cause, count(*) from taskd.history as h join taskd.jobs as j on j.id = h.job_id "
            f"where (j.payload->>'ms')::integer = {round(long_s * 1000)} group by 1"
        )
        assert slowest <= ANSWER_S
        assert again == [], "short jobs were stored after the return without a second run"
        assert causes == [("lease_expired", long)]
        assert longs[0].ended is None, "a long job was stopped"
        assert stopped > longs[0].started
        assert written <= 2 * outage_s
        report.add(
            case="F6 long outage",
            load=f"{short} jobs of {short_s:.0f} s, {long} of {long_s:.0f} s, 5 submits/s",
            faults=f"Postgres away for {outage_s:.0f} s, lease {lease_s:g} s",
            counts=findings.counts | {"log lines of the worker": written},
            worst=f"slowest answer {slowest:.2f} s",
            bound=f"{ANSWER_S:g} s; 2 log lines a second",
            seed=case.seed,
        )


async def test_f7_answer_cut_after_the_commit(durable: Cluster, report: Report) -> None:
    submits = round(scaled(2000, 300))
    async with system(durable, through_proxy=True) as case:
        await begin(case, "one")
        assert case.proxy is not None
        case.proxy.cut_after_commit("taskd.insert_jobs", share=0.5)

        load = case.load(mixed(case.seed), rate=25, seconds=submits / 25, repeat=True, connections=32)
        async with load:
            pass
        case.proxy.pass_()
        await case.quiet(60)

        findings = await case.check()
        assert len(case.tally.accepted) == submits == await case.count("taskd.jobs")
        assert set(case.tally.statuses) <= {200, 503}
        report.add(
            case="F7 answer cut after the commit",
            load=f"{submits} submits with a unique key, repeated until 2xx",
            faults=f"{case.proxy.cuts} answers cut",
            counts=findings.counts | {"answered 503": case.tally.statuses[503]},
            worst=f"{await case.count('taskd.jobs')} rows",
            bound=f"{submits} rows",
            seed=case.seed,
        )


async def test_f8_blackhole(durable: Cluster, report: Report) -> None:
    silent_s = scaled(60, 12)
    async with system(durable, through_proxy=True) as case:
        await begin(case, "one")
        assert case.proxy is not None
        limit = 2 * 10 + 3 + 2  # two API processes of pool_max 10, three of the node, the rig's own

        async with case.load(mixed(case.seed), rate=50, seconds=silent_s + 20, connections=64) as driver:
            await asyncio.sleep(5)
            case.proxy.blackhole()
            await asyncio.sleep(silent_s)
            case.proxy.pass_()
            back = time.monotonic()
            while not driver.ended:
                await asyncio.sleep(1)
                open_now = await connections(case)
                assert open_now <= limit
        await case.quiet(90)

        findings = await case.check()
        slowest = max(case.tally.seconds)
        recovered = max(gaps(case.tally.accepted_at, [back]))
        assert slowest <= ANSWER_S
        assert recovered <= 10
        report.add(
            case="F8 blackhole",
            load="50/s over 64 connections",
            faults=f"nothing carried for {silent_s:g} s, no RST",
            counts=findings.counts | {"connections at the end": await connections(case)},
            worst=f"slowest answer {slowest:.2f} s, back {recovered:.2f} s after",
            bound=f"{ANSWER_S:g} s, 10 s, {limit} connections",
            seed=case.seed,
        )


async def test_f9_delay_and_jitter(durable: Cluster, report: Report) -> None:
    seconds = scaled(60, 15)
    slots, job_s, rtt_s = 16, 0.1, 0.6
    async with system(durable, through_proxy=True, lease_s=30, heartbeat_s=3, sweep_s=5) as case:
        await begin(case, "one")
        assert case.proxy is not None
        await case.driver().run(fixed(100), rate=200, seconds=2)
        case.proxy.delay(rtt_s / 2, rtt_s / 2)
        await asyncio.sleep(3)
        before, began = await case.count("taskd.outcomes"), time.monotonic()
        load = case.load(fixed(100), rate=30, seconds=seconds, connections=64)
        async with load:
            pass
        rate = (await case.count("taskd.outcomes") - before) / (time.monotonic() - began)
        case.proxy.delay(0)
        case.proxy.throttle(8000)
        async with case.load(fixed(100), rate=2, seconds=seconds):
            pass
        case.proxy.pass_()
        await case.quiet(120)

        findings = await case.check()
        least = slots / (job_s + 4 * rtt_s)
        assert case.logged("lease lost") == []
        assert await case.count("taskd.history") == 0
        assert rate >= least
        report.add(
            case="F9 delay and jitter",
            load=f"30/s, {slots} slots, jobs of {job_s:g} s; then 2/s",
            faults=f"300 ms ± 300 ms each way, then 64 kbit/s a connection, {seconds:g} s each",
            counts=findings.counts,
            worst=f"{rate:.1f} jobs/s under delay, 0 leases lost",
            bound=f"{least:.1f} jobs/s, 0",
            seed=case.seed,
        )


_ERRORS = """
create function public.fail_at_random() returns trigger language plpgsql as $$
declare
    state text := (array['53100', '53200', '57014', '40001', '40P01'])[1 + floor(random() * 5)::integer];
begin
    if random() < 0.05 then
        raise exception 'planted' using errcode = state;
    end if;
    return null;
end $$;
create trigger fail_insert after insert on taskd.jobs
    for each statement execute function public.fail_at_random();
create trigger fail_claim after update on taskd.queue
    for each statement execute function public.fail_at_random();
create trigger fail_outcome after insert on taskd.outcomes
    for each statement execute function public.fail_at_random();
"""
_BAD_ROWS = """
create function public.refuse_marked() returns trigger language plpgsql as $$
begin
    if tg_table_name = 'jobs' and (to_jsonb(new)->'payload'->>'n')::integer % 10 = 3 then
        raise exception 'planted' using errcode = '54000';
    end if;
    if tg_table_name = 'outcomes' and (to_jsonb(new)->'result'->>'n')::integer % 10 = 7 then
        raise exception 'planted' using errcode = '23514';
    end if;
    return new;
end $$;
create trigger refuse_job before insert on taskd.jobs for each row execute function public.refuse_marked();
create trigger refuse_outcome before insert on taskd.outcomes
    for each row execute function public.refuse_marked();
"""


async def test_f22_storage_errors(durable: Cluster, report: Report) -> None:
    seconds = scaled(120, 12)
    async with system(durable, concurrency=32) as case:
        await begin(case, "one", "two")
        daemons = {name: unit.main for name, unit in case.units.items()}
        await case.ask(_ERRORS)
        async with case.load(mixed(case.seed), rate=RATE, seconds=seconds):
            pass
        await case.ask(
            "drop trigger fail_insert on taskd.jobs; drop trigger fail_claim on taskd.queue; "
            "drop trigger fail_outcome on taskd.outcomes"
        )
        await case.quiet(60)
        assert set(case.tally.statuses) <= {200, 503}
        marked = case.tally.next
        await case.ask(_BAD_ROWS)
        async with case.load(fixed(20), rate=50, seconds=4):
            pass
        await case.quiet(60)

        findings = await case.check()
        refused = {n for n in case.tally.refused if n >= marked}
        nulls = {
            n
            for (n,) in await case.ask(
                "select (j.payload->>'n')::integer from taskd.jobs as j "
                "join taskd.outcomes as o on o.id = j.id where o.status = 'completed' and o.result is null"
            )
        }
        late = range(marked, case.tally.next)
        assert refused == {n for n in late if n % 10 == 3}
        assert nulls == {n for n in late if n % 10 == 7}
        assert {name: unit.main for name, unit in case.units.items()} == daemons
        report.add(
            case="F22 storage errors",
            load=f"{RATE}/s, {seconds:g} s",
            faults="5 % of inserts, claims and verdicts fail with 53100, 53200, 57014, 40001, 40P01; "
            "then rows refused with 54000 and 23514 (no full disk: that needs a file system of its own)",
            counts=findings.counts | {"refused rows": len(refused), "results stored as null": len(nulls)},
            worst="no daemon ended",
            bound="400 for the marked rows alone, null for the marked results alone",
            seed=case.seed,
        )


async def test_f23_locks_and_timeouts(durable: Cluster, report: Report) -> None:
    locked_s = scaled(20, 8)
    async with system(durable) as case:
        await begin(case, "one")
        most_waiting = 0
        backs: list[float] = []

        async with case.load(mixed(case.seed), rate=60, seconds=3 * locked_s + 15, connections=64):
            for behind_a_read in (False, True):
                url = durable.server.url(case.database)
                reader = await psycopg.AsyncConnection.connect(url)
                locker = await psycopg.AsyncConnection.connect(url)
                async with reader, locker:
                    if behind_a_read:
                        await reader.execute("select count(*) from taskd.jobs")
                    lock = asyncio.create_task(
                        locker.execute("lock table taskd.jobs in access exclusive mode")
                    )
                    end = time.monotonic() + locked_s
                    while time.monotonic() < end:
                        await asyncio.sleep(0.5)
                        waiting = await case.count(
                            "pg_stat_activity where wait_event_type = 'Lock' "
                            f"and application_name like 'taskd%' and datname = '{case.database}'"
                        )
                        most_waiting = max(most_waiting, waiting)
                    await reader.rollback()
                    await lock
                    await locker.rollback()
                backs.append(time.monotonic())
                await asyncio.sleep(3)
        await case.quiet(60)

        findings = await case.check()
        slowest = max(case.tally.seconds)
        recovered = max(gaps(case.tally.accepted_at, backs))
        limit = 2 * 10 + 3
        assert set(case.tally.statuses) <= {200, 503}
        assert slowest <= ANSWER_S
        assert recovered <= BACK_S
        assert most_waiting <= limit
        report.add(
            case="F23 locks",
            load="60/s over 64 connections",
            faults=f"taskd.jobs locked for {locked_s:g} s; the same lock waits behind a long read",
            counts=findings.counts | {"waiting backends at most": most_waiting},
            worst=f"slowest answer {slowest:.2f} s, back {recovered:.2f} s after",
            bound=f"{ANSWER_S:g} s, {BACK_S:g} s, {limit} waiting",
            seed=case.seed,
        )


def busiest(times: list[float]) -> int:
    """Return the most of these moments that lie within one second."""
    return max((sum(at <= time_ < at + 1 for time_ in times) for at in times), default=0)


async def test_f24_connection_storm(report: Report) -> None:
    nodes, restarts = 6, round(scaled(6, 2))
    with cluster("max_connections=30") as small:
        async with system(small, through_proxy=True, concurrency=4) as case:
            assert case.proxy is not None
            names = [f"node{number}" for number in range(nodes)]
            await begin(case, *names)
            processes = nodes + 2
            worst = 0.0
            steady: list[float] = []
            async with case.load(mixed(case.seed), rate=50, seconds=restarts * 18):
                for _ in range(restarts):
                    await asyncio.sleep(8)
                    since = time.monotonic()
                    await small.stop_immediate()
                    await asyncio.sleep(3)
                    await small.start()
                    back = time.monotonic()
                    await until(
                        lambda seen=back: case.tally.accepted_at[-1] > seen,  # type: ignore[misc]
                        15,
                        "service is back",
                    )
                    steady.append(time.monotonic() - back)
                    await asyncio.sleep(3)  # until the last link is back
                    connects = [at for at in case.proxy.connected_at if at >= since]
                    worst = max(worst, busiest(connects) / processes)
                    assert small.query("postgres", "select 1") == [(1,)], "an administrator can log in"
            await case.quiet(60)

            findings = await case.check()
            assert set(case.tally.statuses) <= {200, 503}
            assert worst <= 2
            assert max(steady) <= 15
            report.add(
                case="F24 connection storm",
                load=f"50/s, {nodes} nodes, 2 API processes, max_connections 30",
                faults=f"{restarts} × immediate stop for 3 s (no role limit: the rig's role is a superuser)",
                counts=findings.counts,
                worst=f"{worst:.2f} connects a second and process, back in {max(steady):.1f} s",
                bound="2 a second and process, 15 s",
                seed=case.seed,
            )
