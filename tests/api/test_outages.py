"""What clients see while the database does not work."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg

from taskd.store import migrate
from tests.api.server import count_jobs, make_key, publish, running, settings
from tests.postgres import DurablePG

ECHO: dict[str, Any] = {"type": "echo", "payload": {}}


@contextmanager
def frozen(pids: list[int]) -> Iterator[None]:
    """Stop processes with SIGSTOP for as long as the block runs."""
    try:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


async def test_a_frozen_database_is_503_within_five_seconds_and_service_comes_back(
    durable_pg: DurablePG,
) -> None:
    pg = durable_pg()
    url = pg.url()
    migrate.up(url)
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as db:
        await publish(db)
        key, _ = await make_key(db)
        with running(settings(url, workers=1, allow_unsafe=False)) as server:
            assert server.send("POST", "/jobs", key=key, body=ECHO).status == 200
            rows = await (
                await db.execute("select pid from pg_stat_activity where pid <> pg_backend_pid()")
            ).fetchall()
            assert pg.pid is not None
            with frozen([pg.pid, *(pid for (pid,) in rows)]):
                began = time.monotonic()
                refused = server.send("POST", "/jobs", key=key, body=ECHO)
                took_s = time.monotonic() - began
                health = server.send("GET", "/health").status
            end = time.monotonic() + 10
            status = 0
            while status != 200 and time.monotonic() < end:
                status = server.send("POST", "/jobs", key=key, body=ECHO).status
            back_s = time.monotonic() - end + 10

    assert (refused.status, refused.body["error"]) == (503, "database_unavailable")
    assert "retry-after" in refused.headers
    assert took_s < 5.2
    assert health == 200
    assert status == 200
    assert back_s < 5


async def test_a_demoted_primary_is_503_and_stores_nothing(durable_pg: DurablePG) -> None:
    pg = durable_pg()
    url = pg.url()
    migrate.up(url)
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as db:
        await publish(db)
        key, _ = await make_key(db)
        with running(settings(url, workers=1, allow_unsafe=False)) as server:
            assert server.send("POST", "/jobs", key=key, body=ECHO).status == 200
            before = await count_jobs(db)
            await db.execute("alter system set default_transaction_read_only = on")
            await db.execute("select pg_reload_conf()")
            while (await (await db.execute("show default_transaction_read_only")).fetchone()) != ("on",):
                pass
            refused = server.send("POST", "/jobs", key=key, body=ECHO)
            after = await count_jobs(db)

    assert (refused.status, refused.body["error"]) == (503, "database_unavailable")
    assert after == before


async def test_a_restart_of_the_database_loses_nothing_that_was_accepted(durable_pg: DurablePG) -> None:
    pg = durable_pg()
    url = pg.url()
    migrate.up(url)
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as db:
        await publish(db)
        key, _ = await make_key(db)
    accepted: set[str] = set()
    with running(settings(url, workers=1, allow_unsafe=False)) as server:
        for _ in range(3):
            accepted |= {server.send("POST", "/jobs", key=key, body=ECHO).body["job_id"] for _ in range(20)}
            pg.stop()
            pg.start()
            reply = server.send("POST", "/jobs", key=key, body=ECHO)
            assert reply.status == 200  # tried again for nearly 5 s
            accepted.add(reply.body["job_id"])
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as db:
        rows = await (await db.execute("select id::text from taskd.jobs")).fetchall()

    assert accepted <= {row[0] for row in rows}
