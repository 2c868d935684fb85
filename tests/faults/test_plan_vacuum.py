"""F28 and F29 of the fault plan: what holds vacuum back, and what happens without it (`make faults`)."""

from __future__ import annotations

import asyncio
import os
import statistics
import subprocess
import time
from collections.abc import Awaitable, Callable, Sequence

import psycopg
import pytest

from taskd.embedded.account import as_account, choose_account
from tests.faults.rig.cluster import Cluster, cluster
from tests.faults.rig.driver import Body
from tests.faults.rig.feeder import LANE, drain_rate
from tests.faults.rig.keeper import until
from tests.faults.rig.report import Report, scaled
from tests.faults.rig.standby import twins
from tests.faults.rig.system import System, system

pytestmark = pytest.mark.fault

RATE, KEYS = 500, 4
START_P99_S = 1.0
LEAST_DRAIN = 10_000
BACKLOG = 20_000
TOLD_S = 60.0
BACK_S, BACK_SHARE = 120.0, 0.9
LIMITS = "  noop_limited:\n    max_running: 64\n"


def type_of(n: int) -> str:
    """Every tenth job is of a type with `max_running`."""
    return "noop_limited" if n % 10 == 0 else "noop"


def nothing() -> Body:
    return lambda n: {"type": type_of(n), "payload": {"n": n}}


async def limited_keys(case: System) -> list[str]:
    """Make keys with a rate of their own, not far above what they are used at."""
    made = []
    for number in range(KEYS):
        limit = {"rate": 2 * RATE // KEYS, "burst": RATE}
        body = {"name": f"limited {number}", "rate_limit": limit}
        status, answer = await case.admin("POST", "/admin/api-keys", body)
        assert status == 201, answer
        made.append(answer["key"])
    return made


async def submit(case: System, keys: Sequence[str], seconds: float, ended: asyncio.Event) -> None:
    """Submit `RATE` jobs a second with all keys, until `ended` or for `seconds`."""
    step_s = 2.0
    while seconds > 0 and not ended.is_set():
        async with asyncio.TaskGroup() as group:
            for key in keys:
                driver = case.driver(key=key)
                group.create_task(driver.run(nothing(), rate=RATE / len(keys), seconds=step_s, connections=8))
        seconds -= step_s


async def start_p99_s(case: System, share: float = 1.0) -> float:
    """Return the 99th percentile from submit to start of the jobs by HTTP, or of the last share of them."""
    rows = await case.ask(
        "with told as (select extract(epoch from o.started_at - j.created_at)::float8 as late, "
        "percent_rank() over (order by j.id) as place "
        "from taskd.outcomes as o join taskd.jobs as j on j.id = o.id "
        f"where j.priority <> {LANE}) "
        "select percentile_disc(0.99) within group (order by late) from told "
        f"where place >= 1 - {share}"
    )
    return float(rows[0][0])


async def oldest_s(case: System) -> float:
    return (await case.figures("one"))["taskd_oldest_snapshot_seconds"]


async def hold_and_measure(
    case: System, held_s: float, hold: Callable[[], Awaitable[None]], release: Callable[[], Awaitable[None]]
) -> tuple[dict[str, float], list[float]]:
    """Drain and submit while `hold` is in force, and until the rate is back after `release`.

    Returns the figures by name, and the rates of the drains that were made meanwhile.
    """
    keys = await limited_keys(case)
    ended = asyncio.Event()
    load = asyncio.create_task(submit(case, keys, held_s + BACK_S + 120, ended))
    try:
        await drain_rate(case, BACKLOG, type_of)  # the first finds all caches cold
        before = statistics.median([await drain_rate(case, BACKLOG, type_of) for _ in range(5)])
        await hold()
        since = time.monotonic()
        rates: list[float] = []

        async def told() -> bool:
            return await oldest_s(case) >= max(5.0, (time.monotonic() - since) / 2)

        watch = asyncio.create_task(until(told, TOLD_S, "the metric tells of it", every_s=0.5))
        pause_s = max(3.0, held_s / 12)
        while time.monotonic() - since < held_s:
            rates.append(await drain_rate(case, BACKLOG, type_of))
            await asyncio.sleep(pause_s)
        told_s = await watch
        wrong_s = abs(time.monotonic() - since - await oldest_s(case))
        await release()
        released = time.monotonic()
        back = 0.0
        while back < BACK_SHARE * before:
            assert time.monotonic() - released <= BACK_S, (
                f"{back:.0f}/s after {BACK_S} s, {before:.0f}/s before"
            )
            await asyncio.sleep(1)
            back = await drain_rate(case, BACKLOG, type_of)
        back_s = time.monotonic() - released
        await until(lambda: _below(case, held_s / 2), TOLD_S, "the metric tells that it is over", every_s=0.5)
    finally:
        ended.set()
        await asyncio.gather(load, return_exceptions=True)
    await case.quiet(60)
    figures = {"before": before, "told_s": told_s, "wrong_s": wrong_s, "back": back, "back_s": back_s}
    return figures, rates


async def _below(case: System, limit_s: float) -> bool:
    return await oldest_s(case) < limit_s


async def judge(
    case: System, report: Report, what: str, held_s: float, figures: dict[str, float], rates: list[float]
) -> None:
    """Check what must hold of a held snapshot, and report it."""
    findings = await case.check()
    p99_s, last_s = await start_p99_s(case), await start_p99_s(case, 0.2)
    shown = ", ".join(f"{rate:.0f}" for rate in rates)
    print(f"{figures} drains {shown}; start p99 {p99_s:.3f} s, of the last fifth {last_s:.3f} s")
    assert set(case.tally.statuses) == {200}
    assert max(p99_s, last_s) < START_P99_S
    assert min(rates) >= LEAST_DRAIN
    assert figures["told_s"] <= TOLD_S
    assert figures["wrong_s"] <= 15, "the metric is looked at every 10 s"
    report.add(
        case=f"F28 held snapshot, {what}",
        load=f"{RATE}/s with {KEYS} limited keys, every tenth of a type with max_running; "
        f"{len(rates)} backlogs of {BACKLOG} meanwhile",
        faults=f"{what}, for {held_s:g} s",
        counts=findings.counts,
        worst=f"start p99 {p99_s:.3f} s, at the end {last_s:.3f} s; drain {min(rates):.0f}/s at least, "
        f"{figures['before']:.0f}/s before; told after {figures['told_s']:.0f} s; "
        f"{figures['back']:.0f}/s {figures['back_s']:.0f} s after the release",
        bound=f"{START_P99_S:g} s; {LEAST_DRAIN}/s; {TOLD_S:g} s; {BACK_SHARE:.0%} within {BACK_S:g} s",
        seed=case.seed,
    )


async def test_f28_held_snapshot(durable: Cluster, report: Report) -> None:
    held_s = scaled(600, 40)
    async with system(durable, concurrency=250, more=LIMITS) as case:
        case.api()
        case.worker("one")
        await case.ready("one")
        reader = await psycopg.AsyncConnection.connect(durable.server.url(case.database))

        async def hold() -> None:
            await reader.set_isolation_level(psycopg.IsolationLevel.REPEATABLE_READ)
            await reader.execute("select count(*) from taskd.queue")

        async with reader:
            figures, rates = await hold_and_measure(case, held_s, hold, reader.rollback)
        await judge(case, report, "an open REPEATABLE READ transaction", held_s, figures, rates)


async def test_f28_abandoned_replication_slot(report: Report) -> None:
    """The standby's last word was that a reader of its own needs old rows; then it never came back."""
    held_s = scaled(600, 30)
    slot = "abandoned"
    async with twins() as pair, system(pair, concurrency=250, more=LIMITS) as case:
        case.api()
        case.worker("one")
        await case.ready("one")

        async def hold() -> None:
            await case.ask(f"select pg_create_physical_replication_slot('{slot}', true)")
            feedback = ("hot_standby_feedback=on", "wal_receiver_status_interval=1s")
            await pair.add_standby(f"primary_slot_name={slot}", *feedback)
            standby = pair.standby
            assert standby is not None
            url = standby.url(case.database)
            reader = await psycopg.AsyncConnection.connect(url)
            try:
                await reader.set_isolation_level(psycopg.IsolationLevel.REPEATABLE_READ)
                await reader.execute("select count(*) from taskd.queue")

                async def told() -> bool:
                    return await case.count("pg_replication_slots where xmin is not null") == 1

                await until(told, 20, "the slot holds a transaction")
                await asyncio.to_thread(standby.stop)
            finally:
                await reader.close()

        async def release() -> None:
            await case.ask(f"select pg_drop_replication_slot('{slot}')")

        figures, rates = await hold_and_measure(case, held_s, hold, release)
        await judge(case, report, "an abandoned slot with hot_standby_feedback", held_s, figures, rates)


STOP_SHORT = 3_000_000
"""How many numbers before the end a server stops giving them out (PostgreSQL 14 and later)."""
PER_SEGMENT = 1 << 20
"""Transactions in one file of pg_xact."""


def near_the_end(made: Cluster, oldest: int, left: int) -> None:
    """Set the next transaction number of a stopped server `left` before its stop limit."""
    following = oldest + (1 << 31) - 1 - STOP_SHORT - left
    account = choose_account(made.server.data)
    segment = made.server.data / "pg_xact" / f"{following // PER_SEGMENT:04X}"
    segment.write_bytes(bytes(PER_SEGMENT // 4))
    os.chown(segment, account.pw_uid, account.pw_gid)
    segment.chmod(0o600)
    program = [str(made.server.bindir / "pg_resetwal"), "-x", str(following), "-D", str(made.server.data)]
    done = subprocess.run(program, capture_output=True, text=True, **as_account(account))
    assert done.returncode == 0, done.stderr


async def test_f29_transaction_numbers_run_out(report: Report) -> None:
    """A table that can't be vacuumed (its page is broken) keeps the oldest number where it is."""
    rate, left = 40, 1000
    with cluster("autovacuum=off") as made:
        async with system(made) as case:
            await case.ask("create table public.stuck as select 1 as n")
            (path,) = (await case.ask("select pg_relation_filepath('public.stuck')"))[0]
            ((oldest,),) = await case.ask("select min(datfrozenxid::text::bigint) from pg_database")
            await asyncio.to_thread(made.server.stop)
            page = made.server.data / path
            whole = page.read_bytes()
            page.write_bytes(whole[:4096] + b"\xff" * (len(whole) - 4096))
            near_the_end(made, int(oldest), left)
            await made.start()
            case.api()
            case.worker("one")
            await case.ready("one")
            daemons = {name: unit.main for name, unit in case.units.items()}

            def refused() -> bool:
                return case.tally.statuses[503] > 0

            body = nothing()
            number, case.tally.next = case.tally.next, case.tally.next + 1
            case.tally.sent.add(number)
            async with case.load(body, rate=rate, seconds=70, connections=48) as driver:
                worked_s = await until(refused, 40, "no numbers are left")
                lines = len(case.logged("", "one"))
                asked = time.monotonic()
                status, answer = await case.request("POST", "/jobs", body(number), key=True)
                answered_s = time.monotonic() - asked
                ready, why = await case.request("GET", "/ready")
                await asyncio.sleep(10)
                said = (len(case.logged("", "one")) - lines) / (10 + answered_s)
                stopped_accepting = case.tally.accepted_at[-1] < asked

                await asyncio.to_thread(made.server.stop)
                page.write_bytes(whole)
                await made.start()
                for (database,) in await made.ask(
                    "postgres", "select datname from pg_database where datallowconn"
                ):
                    await made.ask(database, "vacuum (freeze)")
                vacuumed = time.monotonic()
                await until(lambda: case.tally.accepted_at[-1] > vacuumed, 30, "service is back")
                back_s = time.monotonic() - vacuumed
                assert not driver.ended
            await case.quiet(60)

            findings = await case.check()
            words = [str(line.get("error", "")) for line in case.logged("not accepting commands")]
            print(f"worked {worked_s:.1f} s; {status} {answer}; {words[:1]}; {said:.2f} lines/s")
            assert set(case.tally.statuses) == {200, 503}
            assert (status, answer["error"]) == (503, "database_unavailable")
            assert ready == 503
            assert "transaction numbers" in str(why)
            assert stopped_accepting
            assert answered_s <= 5.5
            assert words, "the log says what the server says"
            assert said <= 2
            assert {name: unit.main for name, unit in case.units.items()} == daemons
            report.add(
                case="F29 transaction numbers run out",
                load=f"{rate}/s",
                faults=f"pg_resetwal: {left} numbers left before the stop limit; "
                "a table that can't be vacuumed",
                counts=findings.counts | {"answered 503": case.tally.statuses[503]},
                worst=f"503 after {answered_s:.2f} s; {said:.2f} log lines/s; "
                f"back {back_s:.2f} s after the vacuum",
                bound="503, never 400 or 500; 5 s; 2 lines/s; no daemon ended",
                seed=case.seed,
            )


async def sizes(case: System) -> tuple[int, int]:
    """Return the bytes of the hot table and of its indexes."""
    rows = await case.ask("select pg_table_size('taskd.queue'), pg_indexes_size('taskd.queue')")
    return int(rows[0][0]), int(rows[0][1])


async def test_f29_no_vacuum_at_full_load(report: Report) -> None:
    """`full load`: a backlog is kept up by SQL while jobs come by HTTP as well."""
    seconds = scaled(600, 30)
    with cluster("autovacuum=off") as made:
        async with system(made, concurrency=250, more=LIMITS) as case:
            case.api()
            case.worker("one")
            await case.ready("one")
            await drain_rate(case, BACKLOG, type_of)
            at_first = await sizes(case)  # what one backlog takes
            rates = []
            async with case.load(nothing(), rate=100, seconds=seconds):
                end = time.monotonic() + seconds
                while time.monotonic() < end - 3:
                    rates.append(await drain_rate(case, BACKLOG, type_of))
                grown = await sizes(case)
            await case.quiet(60)
            await case.ask("vacuum taskd.queue")
            last = await sizes(case)

            findings = await case.check()
            print(f"first {at_first}, grown {grown}, last {last}; {[round(rate) for rate in rates]}")
            # The plan's bound is the table's. Pages of an index are free for new entries after a vacuum, and
            # only REINDEX gives them back: their sizes are reported.
            assert last[0] <= 2 * at_first[0]
            report.add(
                case="F29 no vacuum",
                load=f"backlogs of {BACKLOG}, one after the other, and 100/s, {seconds:g} s",
                faults="autovacuum is off",
                counts=findings.counts,
                worst=f"hot table {at_first[0] >> 10} KiB at first, {grown[0] >> 10} at most, "
                f"{last[0] >> 10} after the vacuum (its indexes {at_first[1] >> 10}, {grown[1] >> 10}, "
                f"{last[1] >> 10}); drains {max(rates):.0f} to {min(rates):.0f}/s",
                bound="2 × after vacuum",
                seed=case.seed,
            )
