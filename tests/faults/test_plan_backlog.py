"""F27 and F31 of the fault plan: a million jobs that wait, and a herd of retries (`make faults`)."""

from __future__ import annotations

import asyncio
import math
import re
import statistics
import time
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from tests.faults.rig.cluster import Cluster, cluster
from tests.faults.rig.driver import Wire, mixed
from tests.faults.rig.keeper import until
from tests.faults.rig.report import Report, scaled
from tests.faults.rig.system import System, system

pytestmark = pytest.mark.fault

P99_S = 0.050
LIST_S = 0.300
DRAIN_A_SECOND = 1000
LANES = 4
RATE = 100

PEAK = 3.0
DRIFT = 0.20
HERD_S = 60.0


def p99(values: list[float]) -> float:
    return statistics.quantiles(values, n=100)[98]


# -- F27 ---------------------------------------------------------------------------------------------------

_LOG = (
    "log_min_duration_statement=0",
    "log_parameter_max_length=0",
    "log_line_prefix=@%a@%p@",
    "shared_buffers=256MB",
    "max_wal_size=4GB",
)
_TIMED = re.compile(r"LOG:  duration: ([0-9.]+) ms  (parse|bind|execute) [^:]+: (.*)", re.DOTALL)


class Statements:
    """The statements that a server has logged since this was made, with how long each took."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._from = log.stat().st_size

    def read(self) -> dict[str, list[tuple[str, float]]]:
        """Return by application: text and seconds."""
        with self._log.open("rb") as log:
            log.seek(self._from)
            text = log.read().decode(errors="replace")
        found: defaultdict[str, list[tuple[str, float]]] = defaultdict(list)
        under_way: defaultdict[str, float] = defaultdict(float)
        for entry in re.split(r"^@", text, flags=re.MULTILINE):
            application, _, rest = entry.partition("@")
            pid, _, message = rest.partition("@")
            if match := _TIMED.match(message):
                under_way[pid] += float(match[1]) / 1000
                if match[2] == "execute":
                    found[application].append((match[3].strip(), under_way.pop(pid)))
        return found


async def fill(case: System, ready: int, future: int) -> None:
    """Have so many jobs wait, of the present client, in `LANES` types."""
    await case.ask(
        f"""
        insert into taskd.jobs (id, client, created_at, priority, max_attempts, type, payload)
        select ('01890000-0000-7000-8000-' || lpad(to_hex(i), 12, '0'))::uuid, k.client,
            clock_timestamp(), 0, 5, 'lane' || i % {LANES}, '{{}}'
        from generate_series(1, {ready + future}) as i
        cross join (select client from taskd.api_keys limit 1) as k;
        insert into taskd.queue (id, run_at, priority, max_attempts, type)
        select j.id, case when n <= {future} then now() + interval '1 day' + n * interval '1 s'
                else now() - (n % 3600) * interval '1 s' end, 0, 5, j.type
        from (select j.id, j.type, row_number() over (order by md5(j.id::text)) as n
            from taskd.jobs as j) as j;
        insert into taskd.lanes (type, priority)
        select 'lane' || i, 0 from generate_series(0, {LANES - 1}) as i on conflict do nothing;
        """
    )
    await case.ask("vacuum analyze taskd.jobs, taskd.queue")


async def scanned(case: System) -> dict[str, int]:
    """Return how many rows of each large table were read in scans from end to end so far."""
    rows = await case.ask(
        "select relname::text, seq_tup_read from pg_stat_user_tables "
        "where schemaname = 'taskd' and relname in ('jobs', 'queue', 'outcomes', 'history')"
    )
    return {str(name): int(count) for name, count in rows}


async def completed(case: System) -> float:
    """Return how many jobs the node has completed since its start."""
    figures = await case.figures("one")
    return sum(
        value
        for name, value in figures.items()
        if name.startswith("taskd_settled_total{") and 'status="completed"' in name
    )


async def lists(case: System, seconds: float) -> list[float]:
    """Ask for pages of the list for so long; return how long each took."""
    wire = Wire(case.port)
    took: list[float] = []
    end = time.monotonic() + seconds
    paths = ["/jobs?limit=50", "/jobs?limit=200&type=lane1", "/jobs?limit=50&status=pending"]
    while time.monotonic() < end:
        began = time.monotonic()
        status, _ = await wire.request("GET", paths[len(took) % len(paths)], {"X-API-Key": case.key})
        assert status == 200
        took.append(time.monotonic() - began)
        await asyncio.sleep(0.05)
    wire.close()
    return took


async def test_f27_big_backlog(report: Report) -> None:
    jobs = round(scaled(1_000_000, 200_000))
    future = jobs // 5
    ready = jobs - future
    seconds = scaled(60, 8)
    more = "".join(f"  lane{lane}:\n    handler: noop\n" for lane in range(LANES))
    with cluster(*_LOG) as large:
        async with system(large, more=more, concurrency=32) as case:
            case.api()
            worker = case.worker("one")
            await case.ready("one")
            await worker.end()
            await fill(case, ready, future)
            before = await scanned(case)
            statements = Statements(large.server.log)

            def body(n: int) -> dict[str, object]:
                return {"type": f"lane{n % LANES}", "payload": {"n": n}}

            listing = asyncio.create_task(lists(case, seconds))
            await case.driver().run(body, rate=RATE, seconds=seconds)
            listed = await listing
            standing = list(case.tally.seconds)

            worker.start()
            await until(lambda: worker.starts == 2, 10, "the worker is started again")
            await case.lives("one")
            began, half = time.monotonic(), ready / 2
            driver = case.driver()
            flowing = asyncio.create_task(driver.run(body, rate=RATE, seconds=seconds))
            listing = asyncio.create_task(lists(case, seconds))
            while (done := await completed(case)) < half and time.monotonic() - began < 300:
                await asyncio.sleep(0.05)
            drained = done / (time.monotonic() - began)
            await flowing
            listed += await listing
            flowed = case.tally.seconds[len(standing) :]
            read = {name: count - before[name] for name, count in (await scanned(case)).items()}
            logged = statements.read()
            await until_ready_is_done(case, future)
            await case.check_now()

            claims = [
                took
                for application, entries in logged.items()
                if application.startswith("taskd worker")
                for text, took in entries
                if "taskd.claim(" in text
            ]
            counting = {
                text
                for text, _ in logged["taskd api"]
                if re.search(r"\bcount\(\*\)", text) and not re.search(r"\blimit\b", text)
            }
            slowest = max(took for _, took in logged["taskd api"])
            print(
                f"submit p99 {p99(standing):.4f} {p99(flowed):.4f}, claim p99 {p99(claims):.4f} of "
                f"{len(claims)}, list p99 {p99(listed):.4f}, {drained:.0f}/s, "
                f"slowest statement of the API {slowest:.3f} s, answers {case.tally.statuses}, scanned {read}"
            )
            assert set(case.tally.statuses) == {200}
            assert max(p99(standing), p99(flowed)) < P99_S
            assert p99(claims) < P99_S
            assert p99(listed) < LIST_S
            assert drained >= DRAIN_A_SECOND
            assert counting == set(), "nothing is counted without a bound"
            assert max(read.values()) < jobs // 100, "no table was read from end to end while it was large"
            assert await case.count("taskd.outcomes where status <> 'completed'") == 0
            report.add(
                case="F27 big backlog",
                load=f"{jobs} jobs wait, {future} of them for tomorrow, {RATE} submits/s",
                faults="none (a paused type comes with job control)",
                counts={"accepted": len(case.tally.accepted), "claims": len(claims)},
                worst=f"p99 of a submit {p99(standing) * 1000:.1f} ms before a worker is there, "
                f"{p99(flowed) * 1000:.1f} ms while it drains, of a claim {p99(claims) * 1000:.1f} ms, "
                f"of a list {p99(listed) * 1000:.1f} ms; drained {drained:.0f} jobs/s",
                bound=f"{P99_S * 1000:g} ms, list {LIST_S * 1000:g} ms, {DRAIN_A_SECOND}/s, "
                "no table is read whole",
                seed=case.seed,
            )


async def until_ready_is_done(case: System, future: int) -> None:
    """Wait until only jobs of tomorrow are left."""
    end = time.monotonic() + 600
    while (left := await case.count("taskd.queue")) > future:
        assert time.monotonic() < end, f"{left - future} jobs are left"
        await asyncio.sleep(0.5)
    assert await case.count("taskd.queue where run_at > clock_timestamp()") == future


# -- F31 ---------------------------------------------------------------------------------------------------


async def herd(case: System, jobs: int, down: Path) -> None:
    """Submit so many jobs, all of which call what is down, and wait until each has failed once."""
    down.touch()
    wire = Wire(case.port)
    one = {"type": "caller", "payload": {"down": str(down), "share": 2}}
    for first in range(0, jobs, 1000):
        batch = [one] * min(1000, jobs - first)
        status, answer = await wire.request("POST", "/jobs/bulk", {"X-API-Key": case.key}, {"jobs": batch})
        assert status == 200, answer
    wire.close()
    async with asyncio.timeout(120):
        while await case.count("taskd.history where attempt = 1") < jobs:
            await asyncio.sleep(0.2)


async def others(case: System, seconds: float) -> tuple[list[float], list[float]]:
    """Run the base load for so long; return from submit to start, and from submit to end, of each job."""
    first = case.tally.next
    async with case.load(mixed(case.seed, raises=0.0), rate=50, seconds=seconds):
        pass
    ended = f"{first} + {len(case.tally.sent) - first}"
    end = time.monotonic() + 30
    of_them = "taskd.jobs as j join taskd.outcomes as o on o.id = j.id where j.type like 'ledger%' "
    of_them += f"and (j.payload::jsonb->>'n')::integer >= {first}"
    while await case.count(of_them) < len(case.tally.sent) - first:
        assert time.monotonic() < end, f"jobs {ended} have not ended"
        await asyncio.sleep(0.2)
    rows = await case.ask(
        "select extract(epoch from o.started_at - j.created_at)::float8, "
        f"extract(epoch from o.finished_at - j.created_at)::float8 from {of_them}"
    )
    return [float(row[0]) for row in rows], [float(row[1]) for row in rows]


async def test_f31_a_herd_of_retries(durable: Cluster, report: Report) -> None:
    jobs = round(scaled(50_000, 5000))
    window_s = scaled(HERD_S, 20)
    policy = f"""\
  caller:
    retry:
      max_attempts: 100
      backoff: fixed
      backoff_base: {round(window_s)}s
"""
    async with system(durable, concurrency=32, more=policy) as case:
        case.api()
        case.worker("one")
        await case.ready("one")
        down = case.folder / "down"
        await others(case, 5)  # warm
        before_start, before_end = await others(case, window_s)

        await herd(case, jobs, down)
        down.unlink()
        since = time.time()
        herd_start, herd_end = await others(case, window_s)
        rows = await case.ask(
            "select floor(extract(epoch from s.at) - "
            f"{since!r})::integer, count(*) from ("
            "select h.started_at as at from taskd.history as h join taskd.jobs as j on j.id = h.job_id "
            "where j.type = 'caller' and h.attempt > 1 "
            "union all select o.started_at from taskd.outcomes as o join taskd.jobs as j on j.id = o.id "
            "where j.type = 'caller') as s "
            f"where s.at >= to_timestamp({since!r}) "
            f"and s.at < to_timestamp({since + math.floor(window_s)!r}) group by 1"
        )
        starts = Counter({int(second): int(count) for second, count in rows})
        done = await case.count(
            "taskd.outcomes as o join taskd.jobs as j on j.id = o.id where j.type = 'caller'"
        )
        rows = await case.ask(
            "select count(*) filter (where q.id is null and o.id is null) from taskd.jobs as j "
            "left join taskd.queue as q on q.id = j.id left join taskd.outcomes as o on o.id = j.id"
        )

        mean = starts.total() / math.floor(window_s)
        peak = max(starts.values())
        drift = p99(herd_end) / p99(before_end) - 1
        print(
            f"peak {peak}, mean {mean:.0f}; p99 to the end {p99(before_end):.4f} then {p99(herd_end):.4f}, "
            f"to the start {p99(before_start):.4f} then {p99(herd_start):.4f}; {done} callers done"
        )
        assert rows[0][0] == 0, "no job is lost"
        assert case.found == []
        assert mean > jobs / window_s / 4, "the herd came"
        assert peak <= PEAK * mean
        assert abs(drift) <= DRIFT
        report.add(
            case="F31 herd",
            load=f"50/s of other types, jobs of 20 to 200 ms, {window_s:g} s before and with the herd",
            faults=f"{jobs} jobs fail together, then their downstream allows 20/s",
            counts={"starts in the window": starts.total(), "callers completed": done},
            worst=f"{peak} starts in one second, {mean:.0f} on average; p99 from submit to end "
            f"{p99(before_end) * 1000:.0f} then {p99(herd_end) * 1000:.0f} ms, to start "
            f"{p99(before_start) * 1000:.1f} then {p99(herd_start) * 1000:.1f} ms",
            bound=f"{PEAK:g} × the average; ± {DRIFT:.0%}",
            seed=case.seed,
        )
