"""Clients that dawdle, sit idle, never read or send too much: the others don't notice.

Scaled to what CI has; F25 and F26 of the fault plan have the full numbers.
"""

from __future__ import annotations

import asyncio
import json
import statistics

import psycopg

from tests.api.server import make_key, publish, running, settings
from tests.security.crowd import Crowd, open_files, post, rss, submit_for

REQUEST_TIMEOUT_S = 2.0
SLACK_S = 5.0
"""How much later than `request_timeout` a dripper may be closed."""
RSS_MOST = 300 << 20
DRIPPERS, IDLE, READERS = 200, 500, 50


async def test_a_crowd_of_slow_clients_slows_nobody_else(
    database_url: str, db: psycopg.AsyncConnection
) -> None:
    await publish(db)
    key, _ = await make_key(db)
    given = settings(
        database_url, workers=1, request_timeout_s=REQUEST_TIMEOUT_S, rate=100_000, burst=100_000
    )
    with open_files(2 * DRIPPERS + IDLE + READERS + 200), running(given) as server:
        hostile = Crowd(server.port, key)
        hostile.gather(drippers=DRIPPERS, idle=IDLE, readers=READERS)
        echo = b'{"type":"echo","payload":{}}'
        took = await submit_for(server.port, key, echo, REQUEST_TIMEOUT_S + SLACK_S)
        memory = max(map(rss, server.children()))
        await hostile.over(SLACK_S)
        await hostile.close()

    assert len(hostile.lasted) == 2 * DRIPPERS
    assert max(hostile.lasted) <= REQUEST_TIMEOUT_S + SLACK_S
    assert hostile.answers <= {b"HTTP/1.1 408 ", b"HTTP/1.1 503 ", b""}
    assert statistics.quantiles(took, n=100)[98] < 0.250, sorted(took)[-10:]
    assert memory < RSS_MOST


async def test_bodies_that_are_too_large_are_refused_by_their_head_and_cost_no_memory(
    database_url: str, db: psycopg.AsyncConnection
) -> None:
    await publish(db)
    key, _ = await make_key(db)
    with running(settings(database_url, workers=1)) as server:
        await post(server.port, key, 2, b"{}")
        before = rss(server.children()[0])
        answers = await asyncio.gather(*(post(server.port, key, 10_000_000, b"") for _ in range(200)))
        grown = rss(server.children()[0]) - before

    assert set(answers) == {(413, "too_large")}
    assert grown < 200 * (2 << 20) / 10  # far below the 2 MB each that the plan allows


async def test_large_bodies_that_are_allowed_cost_little_more_than_themselves(
    database_url: str, db: psycopg.AsyncConnection
) -> None:
    await publish(db)
    key, _ = await make_key(db)
    body = json.dumps({"type": "echo", "payload": {"v": "x" * 1_000_000}}).encode()
    with running(settings(database_url, workers=1)) as server:
        await post(server.port, key, 2, b"{}")
        before = rss(server.children()[0])
        answers = await asyncio.gather(*(post(server.port, key, len(body), body) for _ in range(50)))
        grown = rss(server.children()[0]) - before

    assert {status for status, _ in answers} <= {200, 503}
    assert grown < 50 * 5 * len(body)
