"""A worker node within the test's own process, with real children, on a real database."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg

from taskd import wire
from taskd.engine.children import PoolSettings
from taskd.engine.daemon import Daemon, DaemonSettings
from taskd.model.job import Job
from taskd.process.environment import child_env
from taskd.process.sdnotify import Notifier
from taskd.process.signals import Signals
from taskd.registry import Answer, Registry, describe, merge
from taskd.store import jobs
from taskd.store.jobs import Retention
from tests.factories import Connection, new_job

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 20.0
"""How long a test waits for what takes milliseconds on a quiet machine."""

_described: list[Answer] = []


def environment() -> dict[str, str]:
    """Return what children see: they must find the tests' handlers."""
    return child_env({**os.environ, "PYTHONPATH": str(ROOT)}, "test-node")


async def registry(changes: Mapping[str, Mapping[str, object]]) -> Registry:
    """Return the types of `tests.engine.handlers`, described once, with `changes` laid over."""
    if not _described:
        plugin = wire.Plugin(module="tests.engine.handlers")
        argv = [sys.executable, "-m", "taskd.child"]
        _described.extend(await describe([plugin], argv=argv, env=environment()))
        assert not _described[0].problems
    return merge(_described, changes)


class Node:
    """A running node. `add` submits with a hint, as the API does."""

    def __init__(self, daemon: Daemon, signals: Signals, task: asyncio.Task[None], url: str) -> None:
        self.daemon = daemon
        self.signals = signals
        self.task = task
        self.url = url

    @property
    def number(self) -> int:
        """The present incarnation."""
        return self.daemon._node

    async def add(self, type_: str, payload: str = "{}", **members: Any) -> UUID:
        """Store one job and hint at it; return its id."""
        job = new_job(type=type_, payload=payload, **members)
        async with await psycopg.AsyncConnection.connect(self.url, autocommit=True) as db:
            assert await jobs.insert(db, [job]) == {}
            await jobs.notify(db, "taskd", [(type_, job.priority)])
        return job.id

    async def job(self, job_id: UUID) -> Job:
        """Return a job as it is now."""
        async with await psycopg.AsyncConnection.connect(self.url, autocommit=True) as db:
            found = await jobs.get(db, job_id, client=None)
        assert found is not None
        return found

    async def until(self, job_id: UUID, *statuses: str, within_s: float = PATIENCE_S) -> Job:
        """Return the job once it has one of `statuses`, by default a final one."""
        found: Job | None = None

        async def there() -> bool:
            nonlocal found
            found = await self.job(job_id)
            return found.status in statuses if statuses else found.status.final

        await eventually(there, within_s=within_s, what=lambda: str(found))
        assert found is not None
        return found

    async def ended(self) -> None:
        """Wait for the node's end after a drain."""
        await asyncio.wait_for(asyncio.shield(self.task), PATIENCE_S)


async def eventually(
    there: Callable[[], Awaitable[bool]],
    *,
    within_s: float = PATIENCE_S,
    what: Callable[[], str] = lambda: "it never came",
) -> None:
    """Return once `there` is true; fail with `what` after `within_s` seconds."""
    until = time.monotonic() + within_s
    while not await there():
        assert time.monotonic() < until, what()
        await asyncio.sleep(0.01)


async def appears(path: Path, *, lines: int = 1) -> list[str]:
    """Return the lines of a file once there are so many."""

    async def there() -> bool:
        return path.exists() and len(path.read_text().splitlines()) >= lines

    await eventually(there, what=lambda: f"{path} has fewer than {lines} lines")
    return path.read_text().splitlines()


@asynccontextmanager
async def running(
    url: str,
    *,
    types: Mapping[str, Mapping[str, object]] | None = None,
    pools: Mapping[str, PoolSettings] | None = None,
    ready: bool = True,
    **changes: Any,
) -> AsyncIterator[Node]:
    """Run a node; at the end it is drained in a hurry unless it has ended."""
    usual: dict[str, Any] = {
        "node_name": "test-node",
        "url": url,
        "listen_url": url,
        "schema": "taskd",
        "allow_unsafe": True,
        "registry": await registry(types or {}),
        "pools": pools or {"default": PoolSettings(processes=1, concurrency=10)},
        "lease_s": 30.0,
        "heartbeat_s": 0.2,
        "sweep_s": 0.3,
        "drain_s": 20.0,
        "max_crashes": 3,
        "retention": Retention(),
        "result_bytes": 65536,
        "error_bytes": 8192,
        "log_lines": 1000,
        "child_argv": [sys.executable, "-m", "taskd.child"],
        "child_env": environment(),
    }
    settings = DaemonSettings(**(usual | changes))
    signals = Signals(logging.getLogger("tests.engine"))
    up = asyncio.Event()
    daemon = Daemon(settings, signals, Notifier({}), dice=random.Random(1), ready=up.set)
    task = asyncio.create_task(daemon.run())
    waits = asyncio.create_task(up.wait())
    try:
        if ready:
            await asyncio.wait({waits, task}, timeout=PATIENCE_S, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                task.result()
            assert up.is_set(), "the node does not get ready"
        yield Node(daemon, signals, task, url)
    finally:
        waits.cancel()
        signals.drain()
        signals.drain()
        await asyncio.wait({task}, timeout=PATIENCE_S)
        if not task.done():
            task.cancel()
        await asyncio.gather(task, waits, return_exceptions=True)


async def claims_left(db: Connection) -> int:
    """Return how many jobs are still claimed by anybody."""
    cursor = await db.execute("select count(*) from taskd.queue where claimed")
    [[count]] = await cursor.fetchall()
    return int(count)
