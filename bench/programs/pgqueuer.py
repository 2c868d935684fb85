"""pgqueuer in the benchmark; what its manual says stands in bench/peers/pgqueuer.py."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import asyncpg  # type: ignore[import-not-found]
import uvloop
from pgqueuer import PgQueuer  # type: ignore[import-not-found]
from pgqueuer.db import AsyncpgDriver, AsyncpgPoolDriver  # type: ignore[import-not-found]
from pgqueuer.models import Job  # type: ignore[import-not-found]
from pgqueuer.queries import Queries  # type: ignore[import-not-found]

from bench.programs.queue import Handle, Payload, main

BATCH = 1000


class _Producer:
    def __init__(self, queries: Queries) -> None:
        self._queries = queries

    async def one(self, payload: Payload) -> None:
        await self._queries.enqueue("echo", json.dumps(payload).encode())

    async def many(self, payloads: Sequence[Payload]) -> None:
        bodies = [json.dumps(payload).encode() for payload in payloads]
        await self._queries.enqueue(["echo"] * len(bodies), bodies, [0] * len(bodies))


class _PgQueuer:
    async def install(self, url: str) -> None:
        conn = await asyncpg.connect(url)
        queries = Queries(AsyncpgDriver(conn))
        await queries.install()
        await queries.optimize_autovacuum()
        await conn.close()

    @asynccontextmanager
    async def produce(self, url: str, connections: int) -> AsyncIterator[_Producer]:
        async with asyncpg.create_pool(url, min_size=connections, max_size=connections) as pool:
            yield _Producer(Queries(AsyncpgPoolDriver(pool)))

    async def work(self, url: str, handle: Handle) -> None:
        conn = await asyncpg.connect(url)
        pgq = PgQueuer(AsyncpgDriver(conn))

        @pgq.entrypoint("echo")  # type: ignore[untyped-decorator]
        async def echo(job: Job) -> None:
            handle(json.loads(job.payload))

        try:
            await pgq.run(batch_size=BATCH)
        except asyncio.CancelledError:
            pgq.shutdown.set()
            raise


if __name__ == "__main__":
    main(_PgQueuer(), uvloop.run)
