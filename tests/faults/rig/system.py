"""A whole taskd under test: a database, an API and worker nodes as units, a driver, and its checks."""

from __future__ import annotations

import asyncio
import json
import os
import random
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import psycopg

from tests.faults.rig import checker
from tests.faults.rig.cluster import Cluster
from tests.faults.rig.driver import Body, Driver, Ledger, NoAnswer, NotSent, Tally, Wire
from tests.faults.rig.keeper import Unit, until
from tests.faults.rig.proxy import Proxy, proxy

START_S = 15.0
LOOK_S = 5.0
"""How often the invariants of every moment are checked."""

LEASE_S, HEARTBEAT_S, SWEEP_S = 5.0, 1.0, 1.0
"""Of the nodes under test: the shortest lease there is, so that a rescue takes seconds."""

_CONFIG = """\
database:
  url: "{url}"
api:
  port: {port}
  workers: {api_workers}
admin:
  token: {token}
rate_limit:
  rate: 1000000
  burst: 1000000
workers:
  node: {node}
  processes: 2
  concurrency: {concurrency}
  lease: {lease}ms
  heartbeat: {heartbeat}ms
  sweep: {sweep}ms
  drain_timeout: {drain}s
retry:
  max_attempts: 5
  backoff_base: 200ms
plugins:
  - module: tests.faults.rig.jobs
    config:
      ledger: {ledger}
job_types:
  ledger_sync:
    concurrency: 2
{more}log:
  level: info
{top}"""


class System:
    """Made by `system`. What it starts it ends; the case signals processes through its units."""

    def __init__(
        self, cluster: Cluster, database: str, folder: Path, seed: int, between: Proxy | None, **settings: Any
    ) -> None:
        self.cluster = cluster
        self.database = database
        self.folder = folder
        self.seed = seed
        self.dice = random.Random(seed)
        self.proxy = between
        self.ledger = folder / "runs.txt"
        self.units: dict[str, Unit] = {}
        self.tally = Tally()
        self.token = secrets.token_urlsafe(32)
        self.key = ""
        self.found: list[str] = []
        """What the checks of every moment found so far."""
        self.port = free_port()
        self._metrics_port: dict[str, int] = {}
        self.lease_s = float(settings.pop("lease_s", LEASE_S))
        self.sweep_s = float(settings.pop("sweep_s", SWEEP_S))
        self._heartbeat_s = float(settings.pop("heartbeat_s", HEARTBEAT_S))
        self._settings = {"api_workers": 2, "concurrency": 16, "drain": 5, "more": "", "top": "", **settings}
        self._accepted = Ledger(folder / "accepted.txt")
        self._grace_s = 3 * self.sweep_s + 1

    @property
    def url(self) -> str:
        """The URL that taskd is given: through the proxy when there is one."""
        if self.proxy is None:
            return self.cluster.server.url(self.database)
        where = f"127.0.0.1:{self.proxy.port}/{self.database}"
        return f"postgresql://taskd@{where}?sslmode=disable&gssencmode=disable"

    # -- units -------------------------------------------------------------------------------------------

    def worker(self, node: str = "one", **settings: Any) -> Unit:
        """Start a worker node; `figures` reads its metrics."""
        port = self._metrics_port.setdefault(node, free_port())
        return self._unit(node, "worker", top=f"metrics:\n  port: {port}\n", **settings)

    def api(self, name: str = "api", **settings: Any) -> Unit:
        """Start the API."""
        return self._unit(name, "api", **settings)

    def _unit(self, name: str, command: str, **settings: Any) -> Unit:
        """Start a unit; `env` comes on top of the environment, all else is for the configuration."""
        env = settings.pop("env", None)
        config = self.folder / f"{name}.yaml"
        config.touch(mode=0o600)
        values = {
            **self._settings,
            "url": self.url,
            "port": self.port,
            "token": self.token,
            "node": name,
            "lease": round(1000 * self.lease_s),
            "heartbeat": round(1000 * self._heartbeat_s),
            "sweep": round(1000 * self.sweep_s),
            "ledger": self.ledger,
            **settings,
        }
        config.write_text(_CONFIG.format(**values))
        unit = Unit(name, command, config, self.folder / f"{name}.log", self.folder, env)
        self.units[name] = unit
        unit.start()
        return unit

    async def ready(self, *nodes: str) -> None:
        """Wait until the API serves and these nodes live, and make the key."""
        await until(self._serves, START_S, lambda: f"the API serves: {self.words('api')}")
        for node in nodes:
            await self.lives(node)
        if not self.key:
            status, answer = await self.admin("POST", "/admin/api-keys", {"name": "faults"})
            assert status == 201, f"no key: {status} {answer} {self.words('api')}"
            self.key = answer["key"]

    async def lives(self, node: str) -> float:
        """Wait until a node claims jobs (its latest start has a live row); returns the seconds that took."""
        log = self.folder / f"{node}.log"
        starts = self.units[node].starts

        def lives() -> bool:
            text = log.read_text(errors="replace") if log.exists() else ""
            return text.count("node is ready") >= max(1, starts)

        return await until(lives, START_S, lambda: f"node {node} is ready: {self.words(node)}")

    async def _serves(self) -> bool:
        try:
            status, _ = await self.request("GET", "/ready")
        except (NotSent, NoAnswer):
            return False
        return status == 200

    async def figures(self, node: str) -> dict[str, float]:
        """Return the metrics of a worker node, by name and labels as they are written."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self._metrics_port[node])
        try:
            writer.write(b"GET /metrics HTTP/1.1\r\n\r\n")
            text = (await asyncio.wait_for(reader.read(), 5.0)).decode().partition("\r\n\r\n")[2]
        finally:
            writer.close()
        lines = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, _, value in lines}

    def words(self, unit: str) -> str:
        """Return the end of a unit's log."""
        log = self.folder / f"{unit}.log"
        return log.read_text(errors="replace")[-1500:] if log.exists() else "(nothing)"

    def logged(self, message: str, *units: str) -> list[dict[str, Any]]:
        """Return the log lines of units (default: all) with this message."""
        found = []
        for name in units or tuple(self.units):
            log = self.folder / f"{name}.log"
            for line in log.read_text(errors="replace").splitlines() if log.exists() else ():
                if message in line and line.startswith("{"):
                    found.append(json.loads(line))
        return found

    # -- HTTP and SQL ------------------------------------------------------------------------------------

    async def request(
        self, method: str, path: str, body: object = None, *, key: bool = False
    ) -> tuple[int, Any]:
        """Send one request on a connection of its own."""
        wire = Wire(self.port)
        try:
            return await wire.request(method, path, {"X-API-Key": self.key} if key else {}, body)
        finally:
            wire.close()

    async def admin(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        """Send one request with the admin token."""
        wire = Wire(self.port)
        try:
            return await wire.request(method, path, {"Authorization": f"Bearer {self.token}"}, body)
        finally:
            wire.close()

    def query(self, statement: str) -> list[tuple[Any, ...]]:
        """Return rows, past the proxy."""
        return self.cluster.query(self.database, statement)

    async def ask(self, statement: str) -> list[tuple[Any, ...]]:
        """The same beside the loop."""
        return await asyncio.to_thread(self.query, statement)

    async def count(self, condition: str) -> int:
        """Return how many rows `select count(*) from <condition>` counts."""
        return int((await self.ask(f"select count(*) from {condition}"))[0][0])

    # -- load and checks -----------------------------------------------------------------------------------

    def driver(self, *, repeat: bool = False, key: str = "") -> Driver:
        """Return a driver, by default with the case's key; all drivers of a case share its tally."""
        driver = Driver(self.port, key or self.key, self._accepted, repeat=repeat)
        driver.tally = self.tally
        return driver

    @asynccontextmanager
    async def load(
        self, body: Body, *, rate: float, seconds: float, repeat: bool = False, connections: int = 16
    ) -> AsyncIterator[Driver]:
        """Submit while the block runs, and wait for the rest of it; the invariants are checked meanwhile."""
        driver = self.driver(repeat=repeat)
        checks = asyncio.create_task(self._check_on())
        work = asyncio.create_task(driver.run(body, rate=rate, seconds=seconds, connections=connections))
        try:
            yield driver
            await work
        finally:
            for task in (work, checks):
                task.cancel()
            await asyncio.gather(work, checks, return_exceptions=True)

    async def _check_on(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            await self.check_now()

    async def check_now(self) -> None:
        """Check the invariants of every moment; a database that does not answer is looked at next time."""
        try:
            found = await asyncio.to_thread(checker.during, self.query, grace_s=self._grace_s)
        except psycopg.Error:
            return
        if found:
            self.found.append(str(found))

    async def ended_after(self, moment: float, *causes: str) -> list[float]:
        """Return, for each run with one of these causes, the seconds from Unix time `moment` to its end."""
        named = ", ".join(f"'{cause}'" for cause in causes)
        rows = await self.ask(
            f"select extract(epoch from ended_at)::float8 - {moment!r} from taskd.history "
            f"where cause in ({named}) and ended_at > to_timestamp({moment!r}) order by 1"
        )
        return [float(row[0]) for row in rows]

    async def quiet(self, limit_s: float) -> float:
        """Wait until no job waits or runs; returns the seconds that took."""

        async def empty() -> bool:
            return await self.count("taskd.queue") == 0

        try:
            return await until(empty, limit_s, "all jobs have ended", every_s=0.2)
        except AssertionError:
            rows = await self.ask(
                "select claimed, node, count(*), min(run_at) from taskd.queue group by 1, 2"
            )
            logs = "\n".join(f"{name}: {self.words(name)}" for name in self.units)
            raise AssertionError(f"jobs are left: {rows}\n{logs}") from None

    async def check(self) -> checker.Findings:
        """Check all invariants now that all is quiet; says what it counted.

        Raises:
            AssertionError: one is broken.
        """
        await self.check_now()
        findings = await asyncio.to_thread(checker.after, self.tally, self.query, self.ledger)
        print(f"seed {self.seed}: {self.tally}\n{findings}")
        logs = "\n".join(f"{name}: {self.words(name)}" for name in self.units)
        assert not findings, f"seed {self.seed}\n{findings}\n{logs}"
        assert not self.found, f"seed {self.seed}\n" + "\n".join(self.found) + logs
        return findings

    async def close(self) -> None:
        """End everything that was started."""
        await asyncio.gather(*(unit.stop() for unit in self.units.values()))
        self._accepted.close()


def free_port() -> int:
    """Return a TCP port of loopback that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def chosen_seed() -> int:
    """Return the seed of this run: TASKD_FAULT_SEED, else a new one."""
    return int(os.environ.get("TASKD_FAULT_SEED") or time.time_ns() % 1_000_000)


@asynccontextmanager
async def system(cluster: Cluster, *, through_proxy: bool = False, **settings: Any) -> AsyncIterator[System]:
    """Make a database and a folder for one case; end and remove all of it whatever happens."""
    seed = chosen_seed()
    print(f"seed {seed}")
    if cluster.pid is None:  # a case before this one has failed in the middle
        await cluster.start()
    database = await asyncio.to_thread(cluster.database)
    folder = Path(tempfile.mkdtemp(prefix="taskd-faults-"))
    async with AsyncExitStack() as stack:
        between = None
        if through_proxy:
            between = await stack.enter_async_context(proxy(cluster.socket, random.Random(seed)))
        made = System(cluster, database, folder, seed, between, **settings)
        try:
            yield made
        finally:
            await made.close()
            if cluster.pid is None:
                await cluster.start()
            await asyncio.to_thread(cluster.drop, database)
            if os.environ.get("TASKD_FAULT_KEEP"):
                print(f"kept: {folder}")
            else:
                shutil.rmtree(folder, ignore_errors=True)
