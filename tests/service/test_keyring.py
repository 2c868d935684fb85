"""The keys that a process believes: for how long, how many, and nothing to learn from the clock."""

from __future__ import annotations

import asyncio
import secrets
import statistics
import time
from collections.abc import AsyncIterator
from typing import Any

import psycopg
import pytest

from taskd.model import apikey
from taskd.model.bucket import Limit
from taskd.service import keyring
from taskd.service.batch import Reads
from taskd.service.keyring import KeyRing, listen
from taskd.store import keys
from taskd.store.pool import Link, Pace, Target
from tests.api.server import make_key

Connection = psycopg.AsyncConnection[Any]


class Counting(Link):
    """A link that counts its statements."""

    statements = 0

    async def run(self, work: Any, *, deadline_s: float | None = None) -> Any:
        self.statements += 1
        return await super().run(work, deadline_s=deadline_s)


@pytest.fixture
async def link(database_url: str) -> AsyncIterator[Counting]:
    link = Counting(Target(url=database_url), Pace())
    yield link
    await link.close()


@pytest.fixture
def ring(link: Counting) -> KeyRing:
    return KeyRing(link, Reads(link), pepper=None, default=Limit.of(50, 100))


def soon() -> float:
    return asyncio.get_running_loop().time() + 10


def unknown() -> bytes:
    return apikey.make("tk", secrets.token_bytes(apikey.DICE_BYTES)).text


def wrong(text: str) -> bytes:
    """A key with the public id of `text`, another secret and a checksum that fits."""
    prefix, _, rest = text.partition("-")
    unchecked = f"{prefix}-{rest[:12]}_{'1' * 43}".encode()
    return unchecked + b"_" + apikey._check(unchecked)


async def test_a_key_is_asked_for_once_and_a_wrong_secret_asks_nobody(
    ring: KeyRing, link: Counting, db: Connection
) -> None:
    text, stored = await make_key(db)

    found = [await ring.check(text.encode(), soon()) for _ in range(20)]
    refused = [await ring.check(wrong(text), soon()) for _ in range(20)]

    assert {key and key.id for key in found} == {stored.id}
    assert refused == [None] * 20
    assert link.statements == 1


async def test_what_has_no_form_of_a_key_asks_nobody(ring: KeyRing, link: Counting) -> None:
    good = unknown()

    for text in (b"", b"tk-", good[:-1], good + b"a", good[:-1] + b"\xff", b"x" * 100_000, good.upper()):
        assert await ring.check(text, soon()) is None
    assert link.statements == 0


async def test_ids_that_do_not_exist_are_remembered_within_bounds(
    ring: KeyRing, link: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keyring, "MOST_ABSENT", 100)

    await asyncio.gather(*(ring.check(unknown(), soon()) for _ in range(1000)))

    assert len(ring._absent) == 100
    assert ring._found == {}
    assert link.statements < 20


async def test_keys_that_were_found_are_remembered_within_bounds(
    ring: KeyRing, db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keyring, "MOST_FOUND", 3)
    texts = [(await make_key(db))[0] for _ in range(8)]

    for text in texts:
        assert await ring.check(text.encode(), soon()) is not None

    assert len(ring._found) == 3


async def test_a_forgotten_key_is_looked_up_again(ring: KeyRing, db: Connection) -> None:
    text, stored = await make_key(db)
    assert await ring.check(text.encode(), soon()) is not None
    await keys.revoke(db, stored.id)
    assert await ring.check(text.encode(), soon()) is not None

    ring.forget(stored.public_id)

    assert await ring.check(text.encode(), soon()) is None


async def test_a_key_that_was_compared_is_believed_no_longer_than_the_ring_believes_it(
    ring: KeyRing, db: Connection
) -> None:
    text, stored = await make_key(db)
    now = asyncio.get_running_loop().time()
    key = await ring.check(text.encode(), soon())
    assert key is not None

    believed = ring.still(key, now)
    later = ring.still(key, now + keyring.FOUND_S + 1)
    ring.forget(stored.public_id)
    forgotten = ring.still(key, now)
    again = await ring.check(text.encode(), soon())

    assert (believed, later, forgotten) == (True, False, False)
    assert again == key
    assert not ring.still(key, now)  # it was looked up anew: whoever kept it compares anew


async def test_a_change_is_heard_by_whoever_listens(database_url: str, db: Connection) -> None:
    heard: asyncio.Queue[str] = asyncio.Queue()
    ears = Link(Target(url=database_url), Pace())
    task = asyncio.create_task(listen(ears, heard.put_nowait))
    asked = "select count(*) from pg_stat_activity where datname = current_database() and query = 'select 1'"
    while (await (await db.execute(asked)).fetchone()) == (0,):
        pass

    await keys.notify(db, "AAAAAAAAAAAA")

    assert await asyncio.wait_for(heard.get(), 5) == "AAAAAAAAAAAA"
    task.cancel()
    await asyncio.wait({task})
    await ears.close()


async def test_the_listener_comes_back_after_its_connection_was_ended(
    database_url: str, db: Connection
) -> None:
    heard: asyncio.Queue[str] = asyncio.Queue()
    ears = Link(Target(url=database_url, application="ears"), Pace())
    task = asyncio.create_task(listen(ears, heard.put_nowait))
    end = (
        "select pg_terminate_backend(pid) from pg_stat_activity "
        "where application_name = 'ears' and query = 'select 1'"
    )
    while (await (await db.execute(end)).fetchone()) is None:
        pass

    while heard.empty():
        await keys.notify(db, "AAAAAAAAAAAA")

    task.cancel()
    await asyncio.wait({task})
    await ears.close()


@pytest.mark.parametrize("pepper", [None, b"pepper-of-the-tests-of-32-bytes!"], ids=["plain", "peppered"])
async def test_an_unknown_id_and_a_wrong_secret_take_the_same_time(
    link: Counting, db: Connection, pepper: bytes | None
) -> None:
    ring = KeyRing(link, Reads(link), pepper=pepper, default=Limit.of(50, 100))
    made = apikey.make("tk", secrets.token_bytes(apikey.DICE_BYTES))
    text, _ = await make_key(db)
    if pepper is not None:
        await db.execute("update taskd.api_keys set pepper_version = 1")
    given = {"unknown": made.text, "wrong": wrong(text)}
    took: dict[str, list[int]] = {"unknown": [], "wrong": []}

    until = soon() + 60
    for _ in range(20_000):
        for what, key in given.items():  # in turn: whatever else this machine does hits both alike
            began = time.perf_counter_ns()
            await ring.check(key, until)
            took[what].append(time.perf_counter_ns() - began)

    medians = {what: statistics.median(times) for what, times in took.items()}
    assert abs(medians["unknown"] - medians["wrong"]) < 50_000, medians
