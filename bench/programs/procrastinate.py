"""Procrastinate in the benchmark; what its manual says stands in bench/peers/procrastinate.py."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from procrastinate import App, PsycopgConnector  # type: ignore[import-not-found]

from bench.programs.queue import Handle, Payload, main

CONCURRENCY = 30


def _app(url: str, connections: int, handle: Handle = lambda _: None) -> Any:
    app = App(connector=PsycopgConnector(conninfo=url, min_size=1, max_size=connections))

    @app.task(name="echo")  # type: ignore[untyped-decorator]
    async def echo(**payload: Any) -> None:
        handle(payload)

    return app


class _Producer:
    def __init__(self, app: Any) -> None:
        self._task = app.tasks["echo"]

    async def one(self, payload: Payload) -> None:
        await self._task.defer_async(**payload)

    async def many(self, payloads: Sequence[Payload]) -> None:
        await self._task.batch_defer_async(*payloads)


class _Procrastinate:
    async def install(self, url: str) -> None:
        app = _app(url, 1)
        async with app.open_async():
            await app.schema_manager.apply_schema_async()

    @asynccontextmanager
    async def produce(self, url: str, connections: int) -> AsyncIterator[_Producer]:
        app = _app(url, connections)
        async with app.open_async():
            yield _Producer(app)

    async def work(self, url: str, handle: Handle) -> None:
        app = _app(url, CONCURRENCY + 1, handle)
        async with app.open_async():
            await app.run_worker_async(
                concurrency=CONCURRENCY, delete_jobs="always", install_signal_handlers=False
            )


if __name__ == "__main__":
    main(_Procrastinate())
