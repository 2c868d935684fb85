"""A database that many examples of a property share, and the plain coroutines' way into it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import psycopg
import pytest
from hypothesis import HealthCheck, settings

from tests.factories import Connection
from tests.postgres import Server, _database

T = TypeVar("T")

TIMES = int(os.environ.get("TASKD_TEST_EXAMPLES", "1"))
"""How many times the usual number of examples a property is tried with."""

_EMPTY = "; ".join(
    f"delete from taskd.{table}"
    for table in (
        *("jobs", "queue", "outcomes", "history", "unique_keys", "lanes", "cancel_requests"),
        *("node_types", "running", "nodes", "types", "type_limits"),
    )
)


def examples(count: int, **members: Any) -> settings:
    """Return settings for `count` examples; none is timed, since the machine may be busy."""
    usual: dict[str, Any] = {
        "max_examples": count * TIMES,
        "deadline": None,
        "suppress_health_check": [HealthCheck.too_slow, HealthCheck.filter_too_much],
        "print_blob": True,
    }
    return settings(**(usual | members))


class World:
    """A migrated database and three connections: that of an onlooker, and one for each of two nodes."""

    def __init__(self, runner: asyncio.Runner, onlooker: Connection, nodes: list[Connection]) -> None:
        self._runner = runner
        self.db = onlooker
        self.nodes = nodes

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine to its end, from code that is none itself."""
        return self._runner.run(work)

    async def clear(self) -> None:
        """Take everything out of the database: an example begins."""
        await self.db.execute(_EMPTY.encode())

    async def blocked(self, one: Connection) -> bool:
        """Return whether `one` waits for a lock."""
        cursor = await self.db.execute(
            "select cardinality(pg_blocking_pids(%s)) > 0", (one.info.backend_pid,)
        )
        [(waits,)] = await cursor.fetchall()
        return bool(waits)

    async def due(self) -> None:
        """Let the time come for all that waits."""
        await self.db.execute(
            "update taskd.queue set run_at = clock_timestamp() where run_at > clock_timestamp()"
        )


@contextmanager
def planted(shared: World, function: str, right: str, wrong: str) -> Iterator[None]:
    """Have a fault in a function of the database for a while: `wrong` stands in it in place of `right`."""

    async def replace(text: str) -> None:
        await shared.db.execute(text.encode())

    async def definition() -> str:
        cursor = await shared.db.execute(
            "select pg_get_functiondef(p.oid) from pg_proc as p"
            " where p.pronamespace = 'taskd'::regnamespace and p.proname = %s",
            (function,),
        )
        [(text,)] = await cursor.fetchall()
        return str(text)

    sound = shared.run(definition())
    assert right in sound, f"{function} does not say {right!r}"
    shared.run(replace(sound.replace(right, wrong)))
    try:
        yield
    finally:
        shared.run(replace(sound))


@contextmanager
def world(pg: Server, request: pytest.FixtureRequest, name: str) -> Iterator[World]:
    """Make a database of its own for a module."""
    made = request.getfixturevalue("template")

    async def connect(url: str) -> Connection:
        return await psycopg.AsyncConnection.connect(url, autocommit=True)

    with (
        _database(pg, f"taskd_test_{name}", template=made.template_dbname) as url,
        asyncio.Runner() as runner,
    ):
        connections = [runner.run(connect(url)) for _ in range(3)]
        try:
            yield World(runner, connections[0], connections[1:])
        finally:
            for connection in connections:
                runner.run(connection.close())
