"""The rate limit of one key over four processes (P16), seen from its client."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

import psycopg
import pytest

from tests.api.server import Server, make_key, publish, running, settings

ABSENT = "/jobs/00000000-0000-4000-8000-000000000000"
"""The cheapest of the limited requests: what passes is a 404."""
RATE = 50
BURST = 100
OFFERED = 400
CONNECTIONS = 16


@dataclass(frozen=True, slots=True)
class Seen:
    """One answer; times by the monotonic clock of the client."""

    sent: float
    received: float
    status: int
    retry_after_s: int


class Connection:
    """One connection that is kept."""

    def __init__(self, server: Server, key: str) -> None:
        self._port = server.port
        self._request = f"GET {ABSENT} HTTP/1.1\r\nHost: t\r\nX-API-Key: {key}\r\n\r\n".encode()
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self) -> Seen:
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._streams
        sent = time.monotonic()
        writer.write(self._request)
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        fields = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:-2])
        await reader.readexactly(int(fields["content-length"]))
        return Seen(sent, time.monotonic(), int(head.split(" ")[1]), int(fields.get("retry-after", 0)))

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()


async def offer(server: Server, key: str, duration_s: float) -> list[Seen]:
    """Send `OFFERED` requests a second, evenly, over `CONNECTIONS` connections."""
    loop = asyncio.get_running_loop()
    seen: list[Seen] = []
    began = loop.time()

    async def one(number: int) -> None:
        connection = Connection(server, key)
        step_s = CONNECTIONS / OFFERED
        due = began + number / OFFERED
        while due < began + duration_s:
            await asyncio.sleep(max(0.0, due - loop.time()))
            seen.append(await connection.ask())
            due += step_s
        connection.close()

    await asyncio.gather(*(one(number) for number in range(CONNECTIONS)))
    return seen


def too_many(passed: Sequence[Seen], starts: Sequence[Seen]) -> list[str]:
    """Return the windows in which more passed than may, of all windows that begin with one of `starts`.

    A request takes its token between its sending and its answer, so a window from a sending to an answer
    needs no allowance for the clocks: only the token that falls due at its very end counts.
    """
    wrong = []
    for first in starts:
        inside = sorted(one.received for one in passed if one.sent >= first.sent)
        for count, end in enumerate(inside, start=1):
            allowed = BURST + RATE * (end - first.sent) + 1
            if count > allowed:
                wrong.append(f"{count} passed in {end - first.sent:.3f} s, not {allowed:.1f}")
    return wrong


async def judge(server: Server, key: str, duration_s: float, starts: int) -> None:
    seen = await offer(server, key, duration_s)

    assert {one.status for one in seen} == {404, 429}
    passed = [one for one in seen if one.status == 404]
    refused = [one for one in seen if one.status == 429]
    assert all(one.retry_after_s >= 1 for one in refused)
    assert too_many(passed, passed[:: max(1, len(passed) // starts)]) == []
    # From the first sending to the last: the tokens due within it could all be had.
    span_s = max(one.sent for one in seen) - min(one.sent for one in seen)
    assert len(passed) >= 0.98 * (BURST + RATE * span_s)


async def test_four_processes_pass_no_more_than_the_limit_and_hardly_less(
    database_url: str, db: psycopg.AsyncConnection
) -> None:
    await publish(db)
    key, _ = await make_key(db, rate=RATE, burst=BURST)
    with running(settings(database_url, workers=4)) as server:
        await judge(server, key, duration_s=15.0, starts=1000)


@pytest.mark.fault
async def test_the_limit_holds_for_ten_minutes(database_url: str, db: psycopg.AsyncConnection) -> None:
    await publish(db)
    key, _ = await make_key(db, rate=RATE, burst=BURST)
    with running(settings(database_url, workers=4)) as server:
        await judge(server, key, duration_s=600.0, starts=50)


async def _retries(database_url: str, db: psycopg.AsyncConnection, keys: int, rounds: int) -> list[Seen]:
    """Refuse each of many keys, wait as long as told, and return what the next request then met."""
    texts = [(await make_key(db, rate=0.7, burst=3))[0] for _ in range(keys)]
    met: list[Seen] = []

    async def one(server: Server, key: str) -> None:
        connection = Connection(server, key)
        for _ in range(rounds):
            while (seen := await connection.ask()).status == 404:
                pass
            connection.close()
            connection = Connection(server, key)  # most likely to another process
            await asyncio.sleep(seen.received + seen.retry_after_s - time.monotonic())
            met.append(await connection.ask())
        connection.close()

    with running(settings(database_url, workers=4)) as server:
        await asyncio.gather(*(one(server, key) for key in texts))
    return met


async def test_the_first_request_after_retry_after_passes(
    database_url: str, db: psycopg.AsyncConnection
) -> None:
    await publish(db)

    met = await _retries(database_url, db, keys=60, rounds=2)

    assert [one.status for one in met] == [404] * 120


@pytest.mark.fault
async def test_retry_after_is_true_500_times(database_url: str, db: psycopg.AsyncConnection) -> None:
    await publish(db)

    met = await _retries(database_url, db, keys=100, rounds=5)

    assert [one.status for one in met] == [404] * 500


async def test_the_limit_survives_a_restart(database_url: str, db: psycopg.AsyncConnection) -> None:
    await publish(db)
    key, _ = await make_key(db, rate=0.01, burst=20)
    statuses = []

    for _ in range(2):
        with running(settings(database_url, workers=4)) as server:
            connections = [Connection(server, key) for _ in range(15)]
            statuses += [(await connection.ask()).status for connection in connections]
            for connection in connections:
                connection.close()

    assert statuses == [404] * 20 + [429] * 10
