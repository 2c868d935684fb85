"""taskd to measure: a migrated database, configurations, and its daemons as separate processes."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg

from bench.cluster import Cluster, rows
from bench.procs import cpu_s, family
from taskd.store import migrate

ROOT = Path(__file__).resolve().parents[1]
READY_S = 30.0
DATABASE = "taskd"
RATE = 1_000_000
"""Requests a second of the benchmark's key, and its burst: in force, and never reached."""

MAIL = json.dumps({"to": "someone@example.com", "subject": "Hello", "text": "x" * 100})
"""A payload with a schema, of the length that many have."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What a measurement changes in the configuration."""

    node: str = "bench"
    processes: int = 2
    concurrency: int = 100
    api_workers: int = 1
    types: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    """`job_types` of the configuration."""
    retention: Mapping[str, str] = field(default_factory=dict)
    handlers: bool = True
    """Whether the benchmark's own job types are there; one of them keeps a process of its own ready."""


DEFAULT = Setup()


@dataclass(frozen=True, slots=True)
class System:
    """A taskd that is installed but may not run yet."""

    cluster: Cluster
    url: str
    port: int
    token: str

    @property
    def stamps(self) -> Path:
        """The file that the handler `stamp` writes to."""
        return self.cluster.folder / "stamps"

    def query(self, statement: str, *arguments: object) -> Any:
        """Return the rows of a statement."""
        return rows(self.url, statement, *arguments)

    def execute(self, *statements: str) -> None:
        """Run statements, each a transaction."""
        with psycopg.connect(self.url, autocommit=True) as conn:
            for statement in statements:
                conn.execute(statement.encode())

    def http(self, method: str, path: str, body: object = None, headers: Mapping[str, str] = {}) -> Any:
        """Send one request and return the JSON of its answer."""
        data = None if body is None else json.dumps(body).encode()
        sent = {"Content-Type": "application/json", **headers}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", data=data, method=method, headers=sent
        )
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as answer:
            return json.load(answer)

    def key(self) -> dict[str, str]:
        """Make an API key, and return the header that carries it."""
        made = self.http(
            "POST", "/admin/api-keys", {"name": "bench"}, {"Authorization": f"Bearer {self.token}"}
        )
        return {"X-API-Key": str(made["key"])}

    def clear(self) -> None:
        """Forget all jobs, and leave nothing for the next measurement to clean up."""
        self.execute(
            "truncate taskd.jobs, taskd.queue, taskd.outcomes, taskd.history, taskd.unique_keys",
            "vacuum analyze",
        )
        self.stamps.unlink(missing_ok=True)
        self.cluster.settle()

    def fill(self, count: int, type_: str, payload: str, **members: object) -> float:
        """Store jobs by `taskd.submit_many`, a thousand at a time; return the seconds it took."""
        job = json.dumps({"type": type_, "payload": json.loads(payload), **members})
        started = time.perf_counter()
        with psycopg.connect(self.url, autocommit=True) as conn:
            for first in range(0, count, 1000):
                jobs = f"[{','.join([job] * min(1000, count - first))}]"
                conn.execute("select count(*) from taskd.submit_many(%s)", [jobs])
        return time.perf_counter() - started

    def empty(self, limit_s: float) -> None:
        """Wait until no job waits or runs.

        Raises:
            TimeoutError: some are left.
        """
        # The newest alone: a scan of the whole queue would cost what is measured.
        statement = b"select exists (select from taskd.queue order by id desc limit 1)"
        end = time.monotonic() + limit_s
        with psycopg.connect(self.url, autocommit=True) as conn:
            while conn.execute(statement).fetchall()[0][0]:
                if time.monotonic() > end:
                    raise TimeoutError(f"jobs were left after {limit_s:.0f} s")
                time.sleep(0.05)
            if conn.execute(b"select exists (select from taskd.queue)").fetchall()[0][0]:
                self.empty(max(0.0, end - time.monotonic()))

    @contextmanager
    def daemon(self, command: str, setup: Setup = DEFAULT) -> Iterator[subprocess.Popen[bytes]]:
        """Run `taskd COMMAND` (api, worker or up) from when it is ready until the block ends."""
        config = self.cluster.folder / f"{setup.node}-{command}.yaml"
        config.touch(mode=0o600)
        config.write_text(json.dumps(_configuration(self, setup)))  # JSON is YAML
        with (self.cluster.folder / f"{setup.node}-{command}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "taskd", "--config", str(config), command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "XDG_RUNTIME_DIR": str(self.cluster.folder), "PYTHONPATH": str(ROOT)},
                start_new_session=True,
            )
        try:
            if command != "worker":
                self._await(process, lambda: self.http("GET", "/ready"))
            if command != "api":
                self._await(process, lambda: self._live(process, setup.node))
            yield process
        finally:
            _end(process)

    def _live(self, process: subprocess.Popen[bytes], node: str) -> None:
        pids = family(process.pid)
        found = "select 1 from taskd.nodes where state = 'live' and name = %s and pid = any(%s)"
        if not self.query(found, node, pids):
            raise ConnectionError("the node is not live yet")

    def _await(self, process: subprocess.Popen[bytes], works: Callable[[], object]) -> None:
        end = time.monotonic() + READY_S
        while True:
            try:
                works()
                return
            except (OSError, psycopg.Error):
                if time.monotonic() > end or process.poll() is not None:
                    logs = sorted(self.cluster.folder.glob("*.log"), key=lambda one: one.stat().st_mtime)
                    last = logs[-1].read_text(errors="replace")[-2000:] if logs else ""
                    raise RuntimeError(f"taskd does not get ready; the end of its log:\n{last}") from None
                time.sleep(0.01)


class Used:
    """CPU that taskd's processes and the database use from here on, by job done."""

    def __init__(self, run: System, pids: list[int]) -> None:
        self._run = run
        self._pids = pids
        self._done = self._count()
        self._before = self._now()

    def per_job_us(self) -> dict[str, float]:
        """Return µs a job that ended since: of the processes, and of the database server."""
        own, store = (after - before for after, before in zip(self._now(), self._before, strict=True))
        done = max(1, self._count() - self._done)
        return {
            "worker_cpu_us_per_job": round(own / done * 1e6, 1),
            "server_cpu_us_per_job": round(store / done * 1e6, 1),
        }

    def _now(self) -> tuple[float, float]:
        return cpu_s({pid for one in self._pids for pid in family(one)}), self._run.cluster.cpu_s()

    def _count(self) -> int:
        return int(self._run.query("select count(*) from taskd.outcomes")[0][0])


def _configuration(run: System, setup: Setup) -> dict[str, object]:
    return {
        "database": {"url": run.url},
        "api": {"port": run.port, "workers": setup.api_workers},
        "admin": {"token": run.token},
        "rate_limit": {"rate": RATE, "burst": RATE},
        "workers": {"node": setup.node, "processes": setup.processes, "concurrency": setup.concurrency},
        "retention": dict(setup.retention),
        "plugins": [{"module": "bench.handlers", "config": {"stamps": str(run.stamps)}}]
        if setup.handlers
        else [],
        "job_types": {name: dict(members) for name, members in setup.types.items()},
        "log": {"level": "warning"},
    }


def _end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)
        raise RuntimeError("taskd did not end within 60 s of SIGTERM") from None


def install(cluster: Cluster) -> System:
    """Make and migrate a database and publish the job types."""
    url = cluster.fresh(DATABASE)
    migrate.up(url)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    run = System(cluster, url, port, secrets.token_urlsafe(32))
    with run.daemon("worker"):
        pass
    return run
