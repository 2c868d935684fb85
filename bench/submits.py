"""Submits past one job a request: bulks over HTTP, and the SQL functions beside a plain INSERT."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Sequence

import psycopg
from psycopg import pq

from bench import load
from bench.system import System

_BARE = (
    "create table if not exists public.bare "
    "(id bigserial primary key, type text not null, payload jsonb not null, "
    "created_at timestamptz default now())"
)
_INSERT = "insert into public.bare (type, payload) values ('echo', $1)"
_SUBMIT = "select taskd.submit('echo', $1)"
_INSERT_MANY = (
    "with stored as (insert into public.bare (type, payload) select e->>'type', e->'payload' "
    "from jsonb_array_elements($1::jsonb) as e returning id) select id from stored"
)
_SUBMIT_MANY = "select job_id from taskd.submit_many($1)"


def bulk(run: System, count: int, key: str, payload: str, *, connections: int = 4) -> dict[str, float]:
    """Durable submits a second over HTTP in bulks of 1000, no worker running; `count` is a multiple of it."""
    body = f'{{"jobs":[{",".join([f"""{{"type":"echo","payload":{payload}}}"""] * 1000)}]}}'.encode()
    numbers = iter(range(count // 1000))
    latencies: list[float] = []

    async def work() -> None:
        connection = load.Connection("127.0.0.1", run.port)
        for _ in numbers:
            started = time.perf_counter()
            status, content = await connection.request("POST", "/jobs/bulk", {"X-API-Key": key}, body)
            latencies.append(time.perf_counter() - started)
            assert status == 200, content[:300]
        connection.close()

    async def all_of_them() -> float:
        started = time.perf_counter()
        await asyncio.gather(*(work() for _ in range(connections)))
        return time.perf_counter() - started

    seconds = asyncio.run(all_of_them())
    stored = run.query("select count(*) from taskd.jobs")[0][0]
    assert stored == count, f"{stored} of {count} stored"
    return {
        "jobs": count,
        "connections": connections,
        "bulk_per_s": round(count / seconds),
        "p50_ms": round(sorted(latencies)[len(latencies) // 2] * 1000, 1),
    }


def sql(run: System, count: int, payload: str, *, connections: int = 32) -> dict[str, float]:
    """`taskd.submit` in a transaction each, and `submit_many` with 1000, each beside plain INSERTs."""
    _publish(run)
    many = json.dumps([{"type": "echo", "payload": json.loads(payload)}] * 1000)
    raw = _rate(run, [_INSERT] * connections, payload, count)
    submit = _rate(run, [_SUBMIT] * connections, payload, count)
    raw_many = 1000 * _rate(run, [_INSERT_MANY], many, count // 1000)
    submit_many = 1000 * _rate(run, [_SUBMIT_MANY], many, count // 1000)
    return {
        "connections": connections,
        "insert_per_s": round(raw),
        "submit_per_s": round(submit),
        "submit_of_insert": round(submit / raw, 2),
        "insert_many_per_s": round(raw_many),
        "submit_many_per_s": round(submit_many),
        "submit_many_of_insert": round(submit_many / raw_many, 2),
    }


def _publish(run: System) -> None:
    info = json.dumps({"name": "echo", "handler": "echo", "plugin": "builtin", "schema": {"type": "object"}})
    with psycopg.connect(run.url, autocommit=True) as conn:
        conn.execute(_BARE.encode())
        conn.execute(
            "insert into taskd.types (type, info) values ('echo', %s) on conflict do nothing", [info]
        )
        conn.execute("truncate public.bare, taskd.jobs, taskd.queue")
        conn.execute("checkpoint")


def _rate(run: System, statements: Sequence[str], argument: str, count: int) -> float:
    """Return executions a second of `count` in all, each a transaction, one connection a statement.

    On libpq itself and prepared, as a driver would: what is measured is the server.
    """
    each = max(1, count // len(statements))
    start = threading.Barrier(len(statements) + 1)

    def work(statement: str) -> None:
        conn = pq.PGconn.connect(run.url.encode())
        conn.prepare(b"s", statement.encode())
        start.wait()
        for _ in range(each):
            result = conn.exec_prepared(b"s", [argument.encode()])
            assert result.status in (pq.ExecStatus.TUPLES_OK, pq.ExecStatus.COMMAND_OK), result.error_message
        conn.finish()

    threads = [threading.Thread(target=work, args=(statement,)) for statement in statements]
    for thread in threads:
        thread.start()
    start.wait()
    started = time.perf_counter()
    for thread in threads:
        thread.join()
    return each * len(statements) / (time.perf_counter() - started)
