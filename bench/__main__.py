"""The first figures of taskd: drain, submit, both together, start latency, idle cost.

`python -m bench` prints JSON; `--write` also puts the table into docs/performance.md. `--short` takes
about a minute. Figures of one run on a shared machine: compare ratios of one run, not runs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg

from bench import load, submits
from bench.system import System, system
from taskd.model.job import COMMAND_LINE, NewJob, new_id
from taskd.store import jobs
from taskd.store.pool import Target, connect

PAYLOAD = '{"to":"someone@example.com","text":"' + "x" * 100 + '"}'
PAGE = Path(__file__).resolve().parents[1] / "docs" / "performance.md"


async def insert(url: str, count: int, type_: str = "echo") -> float:
    """Store `count` jobs in batches of 500 past HTTP and return the seconds it took."""
    conn = await connect(Target(url=url))
    started = time.perf_counter()
    for first in range(0, count, 500):
        now_ms = int(time.time() * 1000)
        await jobs.insert(
            conn,
            [
                NewJob(id=new_id(now_ms, os.urandom(10)), client=COMMAND_LINE, type=type_, payload=PAYLOAD)
                for _ in range(min(500, count - first))
            ],
        )
    seconds = time.perf_counter() - started
    await conn.close()
    return seconds


def wait_empty(run: System, limit_s: float) -> None:
    """Wait until no job waits or runs."""
    end = time.monotonic() + limit_s
    while run.query("select exists (select from taskd.queue)")[0][0]:
        if time.monotonic() > end:
            raise TimeoutError("jobs were left")
        time.sleep(0.05)


def clear(run: System) -> None:
    """Forget all jobs."""
    with psycopg.connect(run.url, autocommit=True) as conn:
        conn.execute("truncate taskd.jobs, taskd.queue, taskd.outcomes, taskd.history, taskd.unique_keys")
        conn.execute("vacuum analyze")
        conn.execute("checkpoint")


def cpu_s(pids: Iterable[int]) -> float:
    """Return the CPU seconds that processes have used."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def family(pid: int) -> list[int]:
    """Return a process and all below it."""
    found = [pid]
    for one in found:
        for task in Path(f"/proc/{one}/task").iterdir():
            found += [int(child) for child in (task / "children").read_text().split()]
    return found


def pss_mib(pids: Iterable[int]) -> float:
    """Return the proportional memory of processes in MiB."""
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1])
    return total / 1024


def drain(run: System, count: int) -> dict[str, float]:
    """Jobs a second while a worker empties a backlog, from the first start to the last end."""
    clear(run)
    inserted_s = asyncio.run(insert(run.url, count))
    with run.daemon("worker") as worker:
        wait_empty(run, 120)
        used_s = cpu_s(family(worker.pid))
    rows = run.query(
        "select count(*), extract(epoch from max(finished_at) - min(started_at))::float8 "
        "from taskd.outcomes where status = 'completed'"
    )
    done, seconds = rows[0]
    assert done == count, f"{done} of {count} completed"
    return {
        "jobs": count,
        "insert_per_s": round(count / inserted_s),
        "drain_per_s": round(count / seconds),
        "worker_cpu_us_per_job": round(used_s / count * 1e6, 1),
    }


def submit(run: System, count: int, connections: int, key: str) -> dict[str, float]:
    """Durable submits a second over HTTP, one job a request, no worker running."""
    clear(run)
    body = b'{"type":"echo","payload":' + PAYLOAD.encode() + b"}"
    outcome = asyncio.run(
        load.submit("127.0.0.1", run.port, key, jobs=count, connections=connections, body=lambda _: body)
    )
    stored = run.query("select count(*) from taskd.jobs")[0][0]
    assert (outcome.statuses, stored) == ({200: count}, count)
    return {
        "jobs": count,
        "connections": connections,
        "submit_per_s": round(outcome.rate),
        "p50_ms": round(outcome.quantile_ms(0.5), 2),
        "p99_ms": round(outcome.quantile_ms(0.99), 2),
    }


def bulk(run: System, count: int, key: str) -> dict[str, float]:
    """Durable submits a second over HTTP in bulks of 1000."""
    clear(run)
    return submits.bulk(run, count, key, PAYLOAD)


def sql(run: System, count: int) -> dict[str, float]:
    """Submits a second by the SQL functions, and what a plain INSERT does in the same run."""
    clear(run)
    return submits.sql(run, count, PAYLOAD)


def together(run: System, count: int, key: str) -> dict[str, float]:
    """Submit over 32 connections while a worker runs the jobs; each exactly once."""
    clear(run)
    body = b'{"type":"echo","payload":' + PAYLOAD.encode() + b"}"
    with run.daemon("worker"):
        outcome = asyncio.run(
            load.submit("127.0.0.1", run.port, key, jobs=count, connections=32, body=lambda _: body)
        )
        wait_empty(run, 120)
    rows = run.query(
        "select count(*), count(*) filter (where status = 'completed' and attempts = 1), "
        "extract(epoch from max(finished_at) - min(started_at))::float8, "
        "(select count(*) from taskd.history) from taskd.outcomes"
    )
    total, once, seconds, history = rows[0]
    assert (total, once, history) == (count, count, 0), rows
    return {
        "jobs": count,
        "submit_per_s": round(outcome.rate),
        "p99_ms": round(outcome.quantile_ms(0.99), 2),
        "done_per_s": round(count / seconds),
        "run_twice": total - once + history,
    }


def latency(run: System, count: int, key: str) -> dict[str, float]:
    """From the insert of a job to its claim by an idle worker, by the database clock."""
    clear(run)
    body = b'{"type":"echo","payload":{}}'

    async def ask() -> None:
        connection = load.Connection("127.0.0.1", run.port)
        for _ in range(count):
            await connection.request("POST", "/jobs", {"X-API-Key": key}, body)
            await asyncio.sleep(0.03)
        connection.close()

    with run.daemon("worker"):
        time.sleep(1)
        asyncio.run(ask())
        wait_empty(run, 10)
    waits = [
        float(row[0])
        for row in run.query(
            "select extract(epoch from o.started_at - j.created_at) * 1000 "
            "from taskd.outcomes as o join taskd.jobs as j using (id) order by 1"
        )
    ]
    return {
        "jobs": count,
        "p50_ms": round(statistics.median(waits), 2),
        "p99_ms": round(waits[int(len(waits) * 0.99)], 2),
    }


def idle(run: System, api_pid: int, seconds: float) -> dict[str, float]:
    """CPU, transactions, memory and connections of API and worker with nothing to do."""
    clear(run)
    with run.daemon("worker") as worker:
        time.sleep(15)  # until what was done before is in the server's counters
        pids = family(worker.pid) + family(api_pid)
        before, commits = cpu_s(pids), run.query(_COMMITS)[0][0]
        time.sleep(seconds)
        used, after = cpu_s(pids) - before, run.query(_COMMITS)[0][0]
        connections = run.query("select count(*) from pg_stat_activity where application_name like 'taskd%'")
        memory = pss_mib(pids)
    return {
        "cpu_percent_of_a_core": round(100 * used / seconds, 2),
        "transactions_per_s": round((after - commits - 1) / seconds, 2),
        "pss_mib": round(memory, 1),
        "processes": len(pids),
        "connections": connections[0][0],
    }


_COMMITS = "select xact_commit + xact_rollback from pg_stat_database where datname = current_database()"


def median_of(rounds: int, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Measure some times and return the median of each figure."""
    runs = [measure() for _ in range(rounds)]
    return {name: round(statistics.median(run[name] for run in runs), 2) for name in runs[0]}


def figures(*, short: bool) -> dict[str, Any]:
    """Run everything and return it by name."""
    rounds = 1 if short else 3
    with system() as run:
        server = run.query("select current_setting('server_version')")[0][0]
        found: dict[str, Any] = {
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": f"{os.cpu_count()} cores (shared), {platform.machine()}",
            "python": platform.python_version(),
            "postgresql": server,
            "rounds": rounds,
        }
        found["drain"] = median_of(rounds, lambda: drain(run, 20_000 if short else 50_000))
        with run.daemon("api") as api:
            key = run.key()
            jobs_ = 5_000 if short else 20_000
            for connections in (1, 32):
                count = jobs_ // (10 if connections == 1 else 1)
                found[f"submit_{connections}"] = median_of(
                    rounds,
                    lambda n=count, c=connections: submit(run, n, c, key),  # type: ignore[misc]
                )
            found["bulk"] = median_of(rounds, lambda: bulk(run, 20_000 if short else 100_000, key))
            found["together"] = together(run, 10_000 if short else 100_000, key)
            found["latency"] = median_of(rounds, lambda: latency(run, 100 if short else 300, key))
            found["idle"] = idle(run, api.pid, 5 if short else 20)
        found["sql"] = median_of(rounds, lambda: sql(run, 20_000 if short else 100_000))
    return found


def table(found: dict[str, Any]) -> str:
    """Return the figures as the manual's page."""
    rows = [
        ("no-op jobs drained a second, backlog of {jobs:.0f}", "drain", "drain_per_s"),
        ("CPU of the worker's processes a job, µs", "drain", "worker_cpu_us_per_job"),
        ("jobs stored a second, batches of 500 past HTTP", "drain", "insert_per_s"),
        ("durable submits a second over HTTP, 1 connection", "submit_1", "submit_per_s"),
        ("durable submits a second over HTTP, 32 connections", "submit_32", "submit_per_s"),
        ("... p50, ms", "submit_32", "p50_ms"),
        ("... p99, ms", "submit_32", "p99_ms"),
        ("durable submits a second over HTTP, bulks of 1000", "bulk", "bulk_per_s"),
        ("`taskd.submit` a second, {connections:.0f} connections", "sql", "submit_per_s"),
        ("... of what a plain INSERT does", "sql", "submit_of_insert"),
        ("`taskd.submit_many` with 1000, jobs a second", "sql", "submit_many_per_s"),
        ("... of what a plain INSERT of an array does", "sql", "submit_many_of_insert"),
        ("submit and work together, {jobs:.0f} jobs, done a second", "together", "done_per_s"),
        ("... jobs run twice", "together", "run_twice"),
        ("insert to claim, idle queue, p50, ms", "latency", "p50_ms"),
        ("... p99, ms", "latency", "p99_ms"),
        ("idle, API and worker: CPU, % of one core", "idle", "cpu_percent_of_a_core"),
        ("... transactions a second", "idle", "transactions_per_s"),
        ("... memory (PSS), MiB", "idle", "pss_mib"),
        ("... database connections", "idle", "connections"),
    ]
    lines = [
        "# First figures",
        "",
        "Made by `make bench` (`python -m bench --write`), which starts its own PostgreSQL with fsync and",
        "synchronous_commit on, one API process and one worker node with two async children. Medians of",
        f"{found['rounds']} rounds; load client, server and taskd share the machine's cores. Compare ratios",
        "of one run; absolute figures differ from machine to machine and from hour to hour.",
        "",
        f"{found['when']}, {found['machine']}, Python {found['python']}, PostgreSQL {found['postgresql']}",
        "",
        "| what | figure |",
        "| --- | --- |",
    ]
    for what, group, name in rows:
        lines.append(f"| {what.format(**found[group])} | {found[group][name]:,g} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure, print, and write the page if asked."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("--short", action="store_true", help="smaller counts, one round")
    parser.add_argument("--write", action="store_true", help="write docs/performance.md too")
    options = parser.parse_args()
    found = figures(short=options.short)
    print(json.dumps(found, indent=2))
    if options.write:
        PAGE.write_text(table(found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
