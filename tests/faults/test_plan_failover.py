"""F10 and F11 of the fault plan: the primary dies and its standby takes over (`make faults`)."""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from collections.abc import Mapping
from datetime import datetime

import psycopg
import pytest

from tests.faults.rig import checker
from tests.faults.rig.checker import read_ledger
from tests.faults.rig.driver import gaps, mixed
from tests.faults.rig.keeper import until
from tests.faults.rig.proxy import Proxy
from tests.faults.rig.report import Report, scaled
from tests.faults.rig.standby import Twins, proxies, shifts_clocks, twins, url_of
from tests.faults.rig.system import System, system

pytestmark = pytest.mark.fault

RATE = 200
SERVICE_S = 15.0
ANSWER_S, SLACK_S = 5.0, 0.5
READ_ONLY_S = 1.0
DRAINED_S = 10.0
LEAST_A_ROUND = 2000
LEASE_S = 30.0
"""The default: a failover is shorter, so that the jobs that run go on."""
LOST_WITHIN_S = 3.0
"""How long before a kill a move may have been made that an asynchronous standby has not seen."""
LAG_S = 0.2
SHIFT_S = 4


async def begin(case: System, ports: Mapping[str, Proxy]) -> None:
    url = url_of(case.database, [between.port for between in ports.values()])
    case.api(url=url)
    for node in ("one", "two"):
        case.worker(node, url=url)
    await case.ready("one", "two")


def starts(case: System) -> list[float]:
    """Return when jobs started, on the boot clock: those of the servers may differ."""
    return [run.started for run in read_ledger(case.ledger)]


async def clock_behind_s(pair: Twins) -> float:
    """Return how far the clock of the primary is behind this process'."""
    before = time.time()
    rows = await pair.ask("postgres", "select extract(epoch from clock_timestamp())::float8")
    return before - float(rows[0][0])


async def accept(case: System, count: int) -> None:
    """Wait until so many more submits were accepted."""
    wanted = len(case.tally.accepted) + count
    await until(lambda: len(case.tally.accepted) >= wanted, 30 + 4 * count / RATE, f"{wanted} are accepted")


@pytest.mark.parametrize("shift", [0, SHIFT_S], ids=["F10", "F10-clock"])
async def test_f10_failover_to_a_synchronous_standby(report: Report, shift: int) -> None:
    """Each new primary's clock is wrong by `shift` against the one before it, to and fro."""
    if shift and not shifts_clocks():
        pytest.skip("libfaketime is not installed: no server's clock can be shifted")
    rounds = round(scaled(10, 2)) if not shift else round(scaled(4, 2))
    frozen_s = scaled(30, 10) if not shift else 0.0
    load_s = rounds * 22 + frozen_s + 25
    async with (
        twins() as pair,
        system(pair, lease_s=LEASE_S, heartbeat_s=3, sweep_s=5) as case,
        proxies(pair, case.seed) as ports,
    ):
        await begin(case, ports)
        backs: list[float] = []
        boots: list[float] = []
        while_frozen = left_waiting = 0

        async with case.load(mixed(case.seed), rate=RATE, seconds=load_s, connections=32) as driver:
            for number in range(rounds):
                await pair.add_standby(clock=f"-{shift}s" if shift and number % 2 == 0 else "")
                await pair.synchronous(True)
                await accept(case, LEAST_A_ROUND)
                if frozen_s and number == 0:
                    with pair.frozen_standby():
                        since = time.monotonic()
                        await asyncio.sleep(frozen_s)
                        until_now = time.monotonic()
                        left_waiting = await case.count(
                            f"pg_stat_activity where wait_event = 'SyncRep' and datname = '{case.database}'"
                        )
                        await pair.kill()
                    while_frozen = sum(since + SLACK_S < at < until_now for at in case.tally.accepted_at)
                else:
                    await pair.kill()
                await pair.promote()
                backs.append(time.monotonic())
                boots.append(time.clock_gettime(time.CLOCK_BOOTTIME))
                slow_s = await clock_behind_s(pair)
                assert abs(slow_s - (shift if number % 2 == 0 else 0)) < 1, "the clock is as wrong as meant"
            assert not driver.ended, "the load went on to the last failover"
        await case.quiet(90)

        findings = await case.check()
        first_2xx = max(gaps(case.tally.accepted_at, backs))
        first_start = max(gaps(starts(case), boots))
        slowest = max(case.tally.seconds)
        cancels = sum(between.cancels for between in ports.values())
        assert set(case.tally.statuses) <= {200, 503}
        assert while_frozen == 0
        assert cancels == 0
        assert first_2xx <= SERVICE_S
        assert first_start <= SERVICE_S
        assert slowest <= ANSWER_S + SLACK_S
        what = f"; each new primary's clock {shift} s back or forth" if shift else ""
        report.add(
            case=f"F10 failover, synchronous{', the clock jumps' if shift else ''}",
            load=f"{RATE}/s over 32 connections, {load_s:g} s, {LEAST_A_ROUND} accepted or more a round",
            faults=f"{rounds} × kill -9 of the primary and promotion; the standby frozen for "
            f"{frozen_s:g} s before one of them{what}",
            counts=findings.counts
            | {
                "2xx while frozen": while_frozen,
                "cancels": cancels,
                "backends that wait for the frozen standby": left_waiting,
            },
            worst=f"first 2xx {first_2xx:.2f} s, first start {first_start:.2f} s after the promotion, "
            f"slowest answer {slowest:.2f} s",
            bound=f"lost 0; {SERVICE_S:g} s; no 2xx, no cancel; {ANSWER_S:g} s",
            seed=case.seed,
        )


def told_as_lost(
    case: System, found: checker.Findings, rows: Mapping[str, checker.Row], kills: list[float]
) -> Counter[str]:
    """Take out of the findings what an asynchronous failover may lose, and count it.

    That is: accepted jobs that are absent, and moves that are undone (a run whose start or verdict is not
    told), both only of the last moments before a kill (`kills`, on the boot clock).
    """
    lost: Counter[str] = Counter()
    gone = {job_id for job_id in case.tally.accepted.values() if job_id not in rows}
    lost["accepted jobs lost"] = len(gone)
    late = {
        run.job_id
        for run in read_ledger(case.ledger)
        if any(kill - LOST_WITHIN_S <= (run.ended or kill) <= kill + LEASE_S for kill in kills)
    }
    for name in ("I1", "I4"):
        left = []
        for text in found.violations[name]:
            job_id = next(word for word in re.split(r"[ :]", text) if word.count("-") == 4)
            if job_id in gone or job_id in late:
                lost["moves undone"] += name == "I4" and job_id not in gone
            else:
                left.append(text)
        found.violations[name][:] = left
    return lost


async def taskd_at(pair: Twins, place: str, database: str) -> int:
    """Return how many connections of taskd the server of a place has."""
    url = pair.server_at(place).url(database)
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as conn:
        cursor = await conn.execute(
            "select count(*) from pg_stat_activity "
            "where application_name like 'taskd%' and datname = current_database()"
        )
        row = await cursor.fetchone()
    assert row is not None
    return int(row[0])


def refusals(log: str, since: float) -> list[float]:
    """Return how many seconds after `since` (Unix time) a server refused writes as read-only."""
    found = []
    for line in log.splitlines():
        if "in a read-only transaction" in line and "ERROR" in line:
            moment, zone = line[:23], line[24:27]
            assert zone in ("GMT", "UTC"), line
            at = datetime.strptime(f"{moment}+0000", "%Y-%m-%d %H:%M:%S.%f%z").timestamp()
            if at >= since:
                found.append(at - since)
    return found


async def test_f11_failover_to_an_asynchronous_standby_and_the_old_primary_comes_back(
    report: Report,
) -> None:
    """Kills, with the old primary back as a standby on its port; then one that is demoted and stays up."""
    rounds = round(scaled(10, 2))
    load_s = rounds * 14 + 45
    async with (
        twins() as pair,
        system(pair, lease_s=LEASE_S, heartbeat_s=3, sweep_s=5) as case,
        proxies(pair, case.seed) as ports,
        proxies(pair, case.seed) as wires,
    ):

        async def follow() -> None:
            port = wires[pair.primary].port
            where = f"host=127.0.0.1 port={port} user=taskd sslmode=disable gssencmode=disable"
            await pair.add_standby(f"primary_conninfo={where}")

        await begin(case, ports)
        backs: list[float] = []
        kills: list[float] = []
        standby_refused = 0

        async with case.load(mixed(case.seed), rate=RATE, seconds=load_s, connections=32) as driver:
            await follow()
            for _ in range(rounds):
                await accept(case, LEAST_A_ROUND)
                wire = wires[pair.primary]
                wire.blackhole()  # the standby lags behind, and what is under way to it never arrives
                await asyncio.sleep(LAG_S)
                await pair.kill()
                kills.append(time.clock_gettime(time.CLOCK_BOOTTIME))
                wire.reset_all()
                wire.pass_()
                await pair.promote()
                backs.append(time.monotonic())
                await follow()
                await accept(case, RATE)
                standby_refused += len(refusals(pair.log_at(pair.spare), 0.0))

            old = pair.primary
            await accept(case, RATE)
            demoted = time.time()
            await pair.read_only(True)
            await asyncio.sleep(0.5)
            await pair.promote()
            kills.append(time.clock_gettime(time.CLOCK_BOOTTIME))
            backs.append(time.monotonic())

            async def drained() -> bool:
                return await taskd_at(pair, old, case.database) == 0

            drained_s = 0.5 + await until(drained, 2 * DRAINED_S, "no connection is left there")
            await accept(case, RATE)
            refused = refusals(pair.log_at(old), demoted)
            assert not driver.ended, "the load went on to the last failover"
        last_refusal = max(refused, default=0.0)
        print(
            f"{len(refused)} refusals, the last after {last_refusal:.2f} s; drained after {drained_s:.2f} s"
        )
        await case.quiet(90)

        await case.check_now()
        findings = await asyncio.to_thread(checker.after, case.tally, case.query, case.ledger)
        rows = await asyncio.to_thread(checker.read_rows, case.query)
        lost = told_as_lost(case, findings, rows, kills)
        first_2xx = max(gaps(case.tally.accepted_at, backs))
        print(f"lost at {rounds} failovers: {dict(lost)}; {case.tally}\n{findings}")
        assert not findings, f"seed {case.seed}\n{findings}"
        assert not case.found, "\n".join(case.found)
        assert set(case.tally.statuses) <= {200, 503}
        assert standby_refused == 0, "taskd wanted to write to a standby"
        assert first_2xx <= SERVICE_S
        assert last_refusal <= READ_ONLY_S
        assert drained_s <= DRAINED_S
        report.add(
            case="F11 failover, asynchronous",
            load=f"{RATE}/s over 32 connections, {load_s:g} s, {LEAST_A_ROUND} accepted or more a round",
            faults=f"{rounds} × kill -9 of the primary while the standby lags {LAG_S:g} s, promotion, old "
            "node back as a standby on its port; then a primary that turns read-only and stays up",
            counts=findings.counts | lost | {"refusals as read-only": len(refused)},
            worst=f"first 2xx {first_2xx:.2f} s after the promotion, last refusal {last_refusal:.2f} s "
            f"and last connection {drained_s:.2f} s after the demotion",
            bound=f"{SERVICE_S:g} s, {READ_ONLY_S:g} s, {DRAINED_S:g} s; loss only of the last "
            f"{LOST_WITHIN_S:g} s",
            seed=case.seed,
        )
