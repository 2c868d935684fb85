"""The types that the door knows: at once when they are published, and few reads whatever is asked."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import psycopg
import pytest

from taskd.errors import Refused, StoreUnavailable
from taskd.model.jobtype import TypeInfo
from taskd.service.batch import Reads
from taskd.service.types import UNKNOWN_S, KnownTypes
from taskd.store import types
from taskd.store.pool import Link, Pace, Target

T = TypeVar("T")


class Counted(Reads):
    """Reads that are counted."""

    count = 0

    async def run(self, work: Callable[[Any], Awaitable[T]], until: float) -> T:
        self.count += 1
        return await super().run(work, until)


@pytest.fixture
async def reads(database_url: str) -> AsyncIterator[Counted]:
    link = Link(Target(url=database_url), Pace())
    yield Counted(link)
    await link.close()


def until(seconds: float = 5.0) -> float:
    return asyncio.get_running_loop().time() + seconds


async def publish(db: psycopg.AsyncConnection[Any], name: str, *, enabled: bool = True) -> None:
    await types.publish(db, [TypeInfo(name=name, handler=name, plugin="test", enabled=enabled)], node=None)


async def refused(known: KnownTypes, name: str) -> str:
    with pytest.raises(Refused) as refusal:
        await known.get(name, until())
    return refusal.value.error


async def test_a_type_is_known_as_soon_as_it_is_published(
    reads: Counted, db: psycopg.AsyncConnection
) -> None:
    known = KnownTypes(reads)
    assert await refused(known, "one") == "not_ready"
    await publish(db, "one")
    assert (await known.get("one", until())).info.name == "one"
    assert await refused(known, "two") == "unknown_type"

    await publish(db, "two")

    assert (await known.get("two", until())).info.name == "two"


async def test_a_type_that_is_switched_on_is_known_at_once(
    reads: Counted, db: psycopg.AsyncConnection
) -> None:
    known = KnownTypes(reads)
    await publish(db, "one", enabled=False)
    assert await refused(known, "one") == "unknown_type"

    await publish(db, "one")

    assert (await known.get("one", until())).submittable


async def test_a_known_type_is_not_read_again(reads: Counted, db: psycopg.AsyncConnection) -> None:
    known = KnownTypes(reads)
    await publish(db, "one")

    for _ in range(100):
        await known.get("one", until())

    assert reads.count == 1


async def test_a_flood_of_unknown_types_makes_few_reads(reads: Counted, db: psycopg.AsyncConnection) -> None:
    known = KnownTypes(reads)
    await publish(db, "one")
    began = time.monotonic()

    for _ in range(4):
        assert set(await asyncio.gather(*(refused(known, f"no{n}") for n in range(200)))) == {"unknown_type"}

    assert reads.count <= 2 + (time.monotonic() - began) / UNKNOWN_S


async def test_an_outage_is_no_reason_to_call_a_type_unknown(db: psycopg.AsyncConnection) -> None:
    link = Link(Target(url="postgresql://taskd@/none?host=/nowhere"), Pace())
    known = KnownTypes(Reads(link))

    with pytest.raises(StoreUnavailable):
        await known.get("one", until(0.3))


async def test_nobody_asks_and_nothing_is_read(
    reads: Counted, db: psycopg.AsyncConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("taskd.service.types.EVERY_S", 0.01)
    monkeypatch.setattr("taskd.service.types.AWAKE_S", 0.01)
    known = KnownTypes(reads)
    await publish(db, "one")
    reading = asyncio.create_task(known.run())
    try:
        await known.get("one", until())
        await asleep(known)
        before = reads.count
        await publish(db, "one", enabled=False)

        assert await refused(known, "one") == "unknown_type"  # not what was known when it fell asleep
        assert reads.count <= before + 2  # it asked, and so the reading goes on
        await asleep(known)
    finally:
        reading.cancel()


async def asleep(known: KnownTypes) -> None:
    """Wait until nothing is read any more."""
    end = time.monotonic() + 5
    while not known._stale:
        assert time.monotonic() < end
        await asyncio.sleep(0.005)
