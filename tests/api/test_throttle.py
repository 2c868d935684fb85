"""The rate limit of a key over several processes: exact, and refusals cost nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast
from uuid import UUID

import pytest

from taskd.api.http1 import DoorRequest
from taskd.api.throttle import Throttle, in_hand, shared
from taskd.errors import Refused
from taskd.model.bucket import Limit
from taskd.service.keyring import Key
from taskd.store.pool import Link, Pace, Target

SLOW = 0.000001
"""Tokens a second: none comes back while a test runs."""


class Counting(Link):
    """A link that counts its statements."""

    statements = 0

    async def run(self, work: Any, *, deadline_s: float | None = None) -> Any:
        self.statements += 1
        return await super().run(work, deadline_s=deadline_s)


@asynccontextmanager
async def throttles(url: str, count: int) -> AsyncIterator[list[tuple[Throttle, Counting]]]:
    links = [Counting(Target(url=url), Pace()) for _ in range(count)]
    try:
        yield [(Throttle(link), link) for link in links]
    finally:
        for link in links:
            await link.close()


def key(rate: float, burst: int) -> Key:
    return Key(
        id=UUID(int=7),
        public_id="000000000000",
        client=UUID(int=7),
        scopes=frozenset(),
        types=None,
        limit=Limit.of(rate, burst),
        digest=bytes(32),
        peppered=False,
    )


async def passes(throttle: Throttle, one: Key, count: int) -> int:
    until = asyncio.get_running_loop().time() + 30

    async def take() -> bool:
        try:
            await throttle.take(one, cast(DoorRequest, SimpleNamespace(extra="")), until)
        except Refused:
            return False
        return True

    return sum(await asyncio.gather(*(take() for _ in range(count))))


async def test_two_processes_together_pass_exactly_the_burst(database_url: str) -> None:
    async with throttles(database_url, 2) as [(one, _), (two, _)]:
        counts = await asyncio.gather(passes(one, key(SLOW, 50), 40), passes(two, key(SLOW, 50), 40))

    assert sum(counts) == 50


async def test_tokens_in_hand_never_make_it_more_than_the_burst(database_url: str) -> None:
    limit = Limit.of(SLOW, 16_384)
    async with throttles(database_url, 2) as [(one, first), (two, _)]:
        passed = 0
        for _ in range(20):
            passed += sum(
                await asyncio.gather(
                    passes(one, key(SLOW, limit.burst), 500), passes(two, key(SLOW, limit.burst), 500)
                )
            )
        statements = first.statements

    assert in_hand(limit) == 2
    assert shared(limit).burst <= passed <= limit.burst
    assert statements < 5000


async def test_a_flood_is_refused_from_memory(database_url: str) -> None:
    async with throttles(database_url, 1) as [(throttle, link)]:
        await passes(throttle, key(SLOW, 5), 10)
        statements = link.statements
        flood = await passes(throttle, key(SLOW, 5), 1000)

    assert flood == 0
    assert link.statements == statements


async def test_a_refusal_says_when_the_next_one_passes(database_url: str) -> None:
    request = cast(DoorRequest, SimpleNamespace(extra=""))
    async with throttles(database_url, 1) as [(throttle, _)]:
        await passes(throttle, key(0.25, 2), 2)
        with pytest.raises(Refused) as refused:
            await throttle.take(key(0.25, 2), request, asyncio.get_running_loop().time() + 5)

    assert refused.value.error == "rate_limited"
    assert refused.value.headers == {"Retry-After": "4"}
    assert request.extra == "RateLimit-Limit: 2\r\nRateLimit-Remaining: 0\r\nRateLimit-Reset: 8\r\n"
