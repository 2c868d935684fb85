"""Sanic with a psycopg pool: one durable INSERT a request. See bench/peers/sanic_insert.py."""

from __future__ import annotations

import json
import sys

from psycopg.types.json import Jsonb
from psycopg_pool import AsyncConnectionPool  # type: ignore[import-not-found]
from sanic import HTTPResponse, Request, Sanic
from sanic.response import json as answer

URL, PORT, POOL = (json.loads(sys.argv[1])[name] for name in ("url", "port", "pool_size"))
app = Sanic("insert", configure_logging=False)


@app.before_server_start
async def open_pool(app: Sanic) -> None:  # type: ignore[type-arg]
    app.ctx.pool = AsyncConnectionPool(
        URL, min_size=POOL, max_size=POOL, open=False, kwargs={"autocommit": True}
    )
    await app.ctx.pool.open(wait=True)


@app.after_server_start
async def ready(app: Sanic) -> None:  # type: ignore[type-arg]
    print(json.dumps({"ready": True}), flush=True)


@app.after_server_stop
async def close_pool(app: Sanic) -> None:  # type: ignore[type-arg]
    await app.ctx.pool.close()


@app.post("/jobs")
async def submit(request: Request) -> HTTPResponse:
    body = request.json
    async with request.app.ctx.pool.connection() as conn:
        cursor = await conn.execute(
            "insert into jobs (type, payload) values (%s, %s) returning id",
            (body["type"], Jsonb(body["payload"])),
        )
        (job_id,) = await cursor.fetchone()
    return answer({"job_id": str(job_id), "status": "pending"})


if __name__ == "__main__":
    app.run("127.0.0.1", PORT, single_process=True, access_log=False, motd=False)
