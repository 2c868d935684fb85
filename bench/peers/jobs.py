"""The workloads of a peer that is a job queue on PostgreSQL, the same for all.

A peer brings a program (in JavaScript or Python, run by its own interpreter) that plays roles: `install` its
tables, `bulk` and `submit` jobs with its own client, `work` with handlers that only note the time. How it is
timed: from the first job's start to the last job's end. Where the peer keeps both moments in the database
(`span`), by these, as for taskd; else by the handlers, which note CLOCK_MONOTONIC, the same in all processes
of a machine: settling the last jobs is then not in the time, an error in favour of the peer. Latencies
are always by the handlers. A run counts only if every job was handled once and none is left.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psycopg

from bench.peers import install
from bench.peers.program import Program
from bench.procs import cpu_s, family, pss_mib

PAYLOAD = {"to": "someone@example.com", "text": "x" * 100}
LIMIT_S = 120.0
"""For each step of a measurement."""

WARM_UP = 100
"""Jobs run before latencies are measured, so that each worker listens and is warm."""

SETTLE_S = 15.0
"""Before idle cost is measured: an idle backend's counters reach pg_stat_database after at most 10 s."""

_COMMITS = "select xact_commit + xact_rollback from pg_stat_database where datname = current_database()"


class JobPeer:
    """A job queue. `prepare` comes first; each other method wants a fresh database of a running server."""

    def __init__(
        self,
        name: str,
        version: str,
        *,
        packages: Sequence[str],
        program: str,
        unfinished: str,
        span: str | None = None,
        processes: int = 1,
        bulk_size: int = 1000,
        share: float = 1.0,
    ) -> None:
        """Describe a peer.

        `packages` are exact, `program` is a file of bench/peers/js or a module of bench/programs,
        `unfinished` is a condition in SQL that holds while jobs wait or run, `span` a query for the seconds
        from the first job's start to the last job's end, `processes` is how many
        workers throughput is measured with, `bulk_size` how many jobs a call of a bulk has. `share` of the
        jobs asked for is enough for a slow peer.
        """
        self.name = name
        self.version = version
        self.packages = packages
        self._program = program
        self._unfinished = f"select {unfinished}"
        self._span = span
        self._processes = processes
        self._bulk_size = bulk_size
        self._share = share
        self._command: Sequence[str] = ()
        self._environment: dict[str, str] = {}

    def prepare(self, cache: Path) -> None:
        """Install what the peer needs under `cache`.

        Raises:
            Unavailable: it can't be had here; the message says why.
        """
        command = install.command(cache, f"{self.name}-{self.version}", self.packages, self._program)
        self._command, self._environment = command

    def drain(self, url: str, count: int) -> dict[str, float]:
        """Empty a backlog that was inserted in bulk before: jobs a second, CPU a job."""
        count = self._enough(count)
        self._install(url)
        self._insert(url, count)
        with psycopg.connect(url, autocommit=True) as conn:
            conn.execute("analyze")
        server = _server_pid(url)
        with self._workers(url, self._processes, start=False) as workers:
            before, server_before = _cpu_s(workers), cpu_s(family(server))
            _start(workers)
            self._wait_finished(url)
            used, server_used = _cpu_s(workers) - before, cpu_s(family(server)) - server_before
            seconds = self._seconds(url, workers, count)
        return {
            "jobs": count,
            "per_s": round(count / seconds),
            "worker_cpu_us_per_job": round(1e6 * used / count, 1),
            "server_cpu_us_per_job": round(1e6 * server_used / count, 1),
        }

    def submit(self, url: str, count: int, connections: int = 32) -> dict[str, float]:
        """Submit one job a transaction over `connections` with the peer's own client: jobs a second."""
        count = self._enough(count)
        self._install(url)
        return {"jobs": count, "per_s": round(count / self._submit(url, count, connections))}

    def bulk(self, url: str, count: int) -> dict[str, float]:
        """Submit many jobs a call with the peer's own client: jobs a second."""
        self._install(url)
        return {"jobs": count, "per_s": round(count / self._insert(url, count))}

    def latency(self, url: str, count: int) -> dict[str, float]:
        """Submit to an idle queue one by one, 30 ms apart: from before the submit to the handler's start."""
        self._install(url)
        with self._workers(url, 1) as workers:
            self._insert(url, WARM_UP)
            self._wait_finished(url)
            self._submit(url, count, 1, pause_ms=30)
            self._wait_finished(url)
            _, waits_ms = _report(workers, WARM_UP + count)
        return {
            "jobs": count,
            "p50_ms": round(quantile(waits_ms, 0.5), 2),
            "p99_ms": round(quantile(waits_ms, 0.99), 2),
        }

    def together(self, url: str, count: int) -> dict[str, float]:
        """Submit one by one over 32 connections while workers run the jobs: jobs done a second."""
        count = self._enough(count)
        self._install(url)
        with self._workers(url, self._processes) as workers:
            self._submit(url, count, 32)
            self._wait_finished(url)
            seconds = self._seconds(url, workers, count)
        return {"jobs": count, "done_per_s": round(count / seconds)}

    def idle(self, url: str, seconds: float) -> dict[str, float]:
        """One worker process with nothing to do: CPU in % of a core, transactions a second, memory."""
        self._install(url)
        with self._workers(url, 1) as workers, psycopg.connect(url, autocommit=True) as conn:
            time.sleep(SETTLE_S)
            before, commits = _cpu_s(workers), _one(conn, _COMMITS)
            time.sleep(seconds)
            used, commits = _cpu_s(workers) - before, _one(conn, _COMMITS) - commits
            memory = pss_mib(pid for worker in workers for pid in family(worker.pid))
        return {
            "cpu_percent": round(100 * used / seconds, 2),
            "transactions_per_s": round((commits - 1) / seconds, 2),
            "pss_mib": round(memory, 1),
        }

    def _enough(self, count: int) -> int:
        return max(1, round(count * self._share))

    def _play(self, role: str, **arguments: object) -> Program:
        return Program([*self._command, role, json.dumps(arguments)], self._environment)

    def _install(self, url: str) -> None:
        with self._play("install", url=url) as program:
            program.answer(LIMIT_S)
        with psycopg.connect(url, autocommit=True) as conn:
            conn.execute("checkpoint")

    def _insert(self, url: str, count: int) -> float:
        arguments = {"count": count, "batch": self._bulk_size, "connections": 4, "payload": PAYLOAD}
        with self._play("bulk", url=url, **arguments) as program:
            return float(program.answer(LIMIT_S)["seconds"])

    def _submit(self, url: str, count: int, connections: int, *, pause_ms: int = 0) -> float:
        arguments = {
            "count": count,
            "connections": connections,
            "pause_ms": pause_ms,
            "payload": PAYLOAD,
        }
        with self._play("submit", url=url, **arguments) as program:
            return float(program.answer(LIMIT_S)["seconds"])

    @contextmanager
    def _workers(self, url: str, processes: int, *, start: bool = True) -> Iterator[list[Program]]:
        """Run workers while the block runs; without `start` they are loaded and wait for `_start`."""
        with ExitStack() as stack:
            workers = [stack.enter_context(self._play("work", url=url)) for _ in range(processes)]
            for worker in workers:
                worker.answer(LIMIT_S)
            if start:
                _start(workers)
            yield workers

    def _seconds(self, url: str, workers: Sequence[Program], count: int) -> float:
        """Return the time from the first job's start to the last job's end."""
        seconds, _ = _report(workers, count)
        if self._span is None:
            return seconds
        with psycopg.connect(url, autocommit=True) as conn:
            return float(_one(conn, self._span))

    def _wait_finished(self, url: str) -> None:
        end = time.monotonic() + LIMIT_S
        with psycopg.connect(url, autocommit=True) as conn:
            while _one(conn, self._unfinished):
                if time.monotonic() > end:
                    raise TimeoutError(f"{self.name}: jobs were left")
                time.sleep(0.05)


def quantile(values: Sequence[float], share: float) -> float:
    """Return the value below which `share` of `values` lie.

    >>> quantile([3.0, 1.0, 2.0], 0.5)
    2.0
    """
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def _start(workers: Sequence[Program]) -> None:
    for worker in workers:
        worker.tell("go")
    for worker in workers:
        worker.answer(LIMIT_S)


def _cpu_s(workers: Sequence[Program]) -> float:
    return cpu_s(pid for worker in workers for pid in family(worker.pid))


def _report(workers: Sequence[Program], count: int) -> tuple[float, list[float]]:
    """Return the seconds from the first start to the last end, and the waits in milliseconds."""
    for worker in workers:
        worker.tell("report")
    reports = [worker.answer(LIMIT_S) for worker in workers]
    handled = sum(report["handled"] for report in reports)
    if handled != count:
        raise RuntimeError(f"{handled} jobs handled, {count} expected")
    worked = [report for report in reports if report["handled"]]
    first, last = min(one["first_ns"] for one in worked), max(one["last_ns"] for one in worked)
    return (last - first) / 1e9, [wait / 1e6 for one in worked for wait in one["waits_ns"]]


def _server_pid(url: str) -> int:
    """Return the process id of the server, the parent of each backend."""
    with psycopg.connect(url) as conn:
        stat = Path(f"/proc/{conn.info.backend_pid}/stat").read_text()
    return int(stat.rpartition(")")[2].split()[1])


def _one(conn: psycopg.Connection[Any], sql: str) -> Any:
    row = conn.execute(sql.encode()).fetchone()
    assert row is not None
    return row[0]
