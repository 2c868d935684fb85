"""How fast a backlog is worked off."""

from __future__ import annotations

import time
from contextlib import ExitStack
from datetime import datetime

import psycopg

from bench.cluster import StatementLog, claim_p99_ms
from bench.system import DATABASE, DEFAULT, MAIL, Setup, System, Used

LIMIT_S = 150.0


def drain(run: System, count: int, type_: str = "echo", setup: Setup = DEFAULT) -> dict[str, float]:
    """Jobs a second while a node empties a backlog, first claim to last end; rows and results are kept."""
    run.clear()
    run.fill(count, type_, MAIL)
    with run.daemon("worker", setup) as worker:
        began = first_claim(run)
        used = Used(run, [worker.pid])
        run.empty(LIMIT_S)
        cpu = used.per_job_us()
    return {"jobs": count, "per_s": rate(run, count, began), **cpu}


def first_claim(run: System) -> datetime:
    """Wait for the first claim and return when it was, within some 5 ms, by the database's clock.

    Not told from the outcomes: what they say is reckoned back from the end of a run.
    """
    statement = (
        b"select clock_timestamp(), exists (select from taskd.queue where claimed) "
        b"or exists (select from taskd.outcomes where node is not null)"
    )
    end = time.monotonic() + LIMIT_S
    with psycopg.connect(run.url, autocommit=True) as conn:
        while time.monotonic() < end:
            now, claimed = conn.execute(statement).fetchall()[0]
            if claimed:
                return now  # type: ignore[no-any-return]
            time.sleep(0.002)
    raise TimeoutError(f"no job was claimed within {LIMIT_S:.0f} s")


def rate(run: System, count: int, began: datetime) -> float:
    """Return jobs a second from `began` to the last end, of those that a node ended.

    Raises:
        RuntimeError: not `count` jobs completed, or one ran twice.
    """
    total, once, seconds = run.query(
        "select count(*), count(*) filter (where status = 'completed' and attempts = 1), "
        "extract(epoch from max(finished_at) - %s)::float8 from taskd.outcomes where node is not null",
        began,
    )[0]
    if (total, once) != (count, count):
        raise RuntimeError(f"of {count} jobs {total} ended and {once} completed in their first run")
    if seconds <= 0:
        raise RuntimeError("all jobs had ended when the measurement began")
    return float(round(count / seconds))


def process(run: System, count: int) -> dict[str, float]:
    """The same for plain functions, each run in a process of its own, with four slots."""
    return drain(run, count, "noop-process", Setup(concurrency=4))


def thread(run: System, count: int) -> dict[str, float]:
    """The same for coroutines that call a plain function in a thread."""
    return drain(run, count, "noop-thread")


def nodes(run: System, count: int, number: int) -> dict[str, float]:
    """The same by several nodes on this machine, which are all ready when the jobs become due at once."""
    run.clear()
    with ExitStack() as stack:
        setups = [Setup(node=f"bench-{n}") for n in range(number)]
        workers = [stack.enter_context(run.daemon("worker", setup)) for setup in setups]
        due = fill_due(run, count)
        used = Used(run, [worker.pid for worker in workers])
        run.empty(LIMIT_S)
        cpu = used.per_job_us()
    return {"jobs": count, "per_s": rate(run, count, due), **cpu}


def fill_due(run: System, count: int) -> datetime:
    """Store jobs that are all due at one moment, a little after they are stored, and return it.

    Raises:
        RuntimeError: storing took so long that some were due before the last was there.
    """
    due: datetime = run.query("select clock_timestamp() + %s * interval '1 s'", 3 + count / 7000)[0][0]
    run.fill(count, "echo", MAIL, run_at=due.isoformat())
    run.cluster.settle()
    if run.query("select clock_timestamp() > %s", due)[0][0]:
        raise RuntimeError("the jobs were due before all of them were stored")
    return due


_LIMITS: list[dict[str, object]] = [
    {"max_running": 500},
    {"rate": 100_000, "rate_burst": 10_000},
    {"concurrency": 100},
    {},
]
LANES = {f"lane-{n:02}": {"handler": "echo", **_LIMITS[n % 4]} for n in range(20)}
"""Twenty types: a quarter each with max_running, a rate, a concurrency, and nothing."""


def backlog(run: System, count: int, done: int) -> dict[str, float]:
    """Jobs a second out of a backlog of `count` over twenty types with limits, until `done` have ended."""
    setup = Setup(types=LANES)
    with run.daemon("worker", setup):
        pass  # publishes the types
    run.clear()
    for name in LANES:
        run.fill(count // len(LANES), name, MAIL)
    run.execute("vacuum analyze")
    run.cluster.settle()
    with StatementLog(run.cluster, DATABASE) as log, run.daemon("worker", setup) as worker:
        used = Used(run, [worker.pid])
        wait_done(run, min(done, count), LIMIT_S)
        cpu = used.per_job_us()
    return {
        "jobs": count,
        "per_s": steady(run),
        "claim_p99_ms": claim_p99_ms(log.statements),
        **cpu,
    }


def future(run: System, count: int, waiting: int) -> dict[str, float]:
    """A drain while so many jobs of the same type wait for tomorrow."""
    run.clear()
    # Stored as due and moved then: a submit with a delay takes four times as long as one without.
    run.fill(waiting, "echo", MAIL)
    run.execute("update taskd.queue set run_at = run_at + interval '1 day'", "vacuum full taskd.queue")
    run.fill(count, "echo", MAIL)
    run.execute("vacuum analyze")
    run.cluster.settle()
    with StatementLog(run.cluster, DATABASE) as log, run.daemon("worker") as worker:
        began = first_claim(run)
        used = Used(run, [worker.pid])
        wait_done(run, count, LIMIT_S)
        cpu = used.per_job_us()
    return {
        "jobs": count,
        "waiting": waiting,
        "per_s": rate(run, count, began),
        "claim_p99_ms": claim_p99_ms(log.statements),
        **cpu,
    }


def wait_done(run: System, count: int, limit_s: float) -> None:
    """Wait until so many jobs have ended.

    Raises:
        TimeoutError: they have not.
    """
    end = time.monotonic() + limit_s
    with psycopg.connect(run.url, autocommit=True) as conn:
        while conn.execute(b"select count(*) from taskd.outcomes").fetchall()[0][0] < count:
            if time.monotonic() > end:
                raise TimeoutError(f"fewer than {count} jobs ended within {limit_s:.0f} s")
            time.sleep(0.2)


def steady(run: System) -> float:
    """Return jobs a second between the first tenth of the ends and the last: without start and stop."""
    ended, seconds = run.query(
        "with e as (select finished_at as at, percent_rank() over (order by finished_at) as place "
        "from taskd.outcomes) "
        "select count(*), extract(epoch from max(at) - min(at))::float8 from e "
        "where place between 0.1 and 0.9"
    )[0]
    return float(round(ended / seconds)) if seconds else 0.0


def store_ended(run: System, count: int) -> None:
    """Store jobs that were made in 2024 and completed two hours ago, past all of taskd's doors."""
    run.execute(
        "insert into taskd.jobs (id, client, created_at, priority, max_attempts, type, payload) "
        "select ('01900000-' || lpad(to_hex(n / 65536), 4, '0') || '-7' || lpad(to_hex(n % 4096), 3, '0') "
        "|| '-8' || substr(md5(n::text), 1, 3) || '-' || substr(md5(n::text), 4, 12))::uuid, "
        "'00000000-0000-7000-8000-000000000001', now(), 0, 3, 'echo', "
        f"'{MAIL}' from generate_series(1, {count}) as n",
        "insert into taskd.outcomes (id, finished_at, started_at, run_at, attempts, max_attempts, status, "
        "result) select id, at, at, at, 1, 3, 'completed', payload "
        "from taskd.jobs, (select now() - interval '2 hours' as at) as past",
        "vacuum analyze",
    )


def growth(run: System, kept: int, count: int) -> dict[str, float]:
    """A drain beside so many jobs that have ended before."""
    run.clear()
    store_ended(run, kept)
    run.fill(count, "echo", MAIL)
    run.cluster.settle()
    with StatementLog(run.cluster, DATABASE) as log, run.daemon("worker") as worker:
        began = first_claim(run)
        used = Used(run, [worker.pid])
        run.empty(LIMIT_S)
        cpu = used.per_job_us()
    return {
        "kept": kept,
        "jobs": count,
        "per_s": rate(run, count, began),
        "claim_p99_ms": claim_p99_ms(log.statements),
        **cpu,
    }
