"""Rows of API keys: who is alive, whose client, what a change leaves alone."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import psycopg
import pytest

from taskd.errors import BadRow
from taskd.model import apikey
from taskd.store import keys
from taskd.store.keys import NewKey, StoredKey

Connection = psycopg.AsyncConnection[Any]
AddKey = Callable[..., Awaitable[StoredKey]]

FAR = datetime(2999, 1, 1, tzinfo=UTC)
PAST = datetime(2001, 1, 1, tzinfo=UTC)


def new_key(number: int = 1, **members: Any) -> NewKey:
    made = apikey.make("tk", number.to_bytes(apikey.DICE_BYTES, "big"))
    digest = apikey.digest(made.text, None)
    usual: dict[str, Any] = {
        "id": UUID(int=number),
        "name": f"key {number}",
        "prefix": made.prefix,
        # the last digits of the dice are the secret's, so each number needs an id of its own
        "public_id": apikey.base62(number, 12),
        "digest": digest,
        "fingerprint": apikey.fingerprint(digest),
        "scopes": ["jobs:write", "jobs:read"],
    }
    return NewKey(**(usual | members))


@pytest.fixture
def add_key(db: Connection) -> AddKey:
    async def add(number: int = 1, **members: Any) -> StoredKey:
        stored = await keys.create(db, new_key(number, **members))
        assert stored is not None
        return stored

    return add


async def test_a_first_key_is_its_own_client(add_key: AddKey) -> None:
    stored = await add_key(1)

    assert stored.client == stored.id
    assert stored.live
    assert (stored.expires_at, stored.revoked_at, stored.last_used_at) == (None, None, None)


async def test_every_member_comes_back(add_key: AddKey, db: Connection) -> None:
    first = await add_key(1)
    wanted = new_key(
        2,
        client=first.client,
        description="of the shop",
        types=["send_email"],
        rate=Decimal("0.25"),
        burst=7,
        max_pending=1000,
        expires_at=FAR,
        pepper_version=1,
    )

    await keys.create(db, wanted)
    stored = await keys.get(db, wanted.id)

    assert stored is not None
    for member in NewKey.__dataclass_fields__:
        assert getattr(stored, member) == getattr(wanted, member), member


async def test_nobody_joins_a_client_that_does_not_exist(db: Connection) -> None:
    assert await keys.create(db, new_key(client=UUID(int=99))) is None
    assert await keys.list_all(db) == []


async def test_two_keys_never_share_a_public_id(db: Connection, add_key: AddKey) -> None:
    first = await add_key(1)

    with pytest.raises(BadRow):
        await keys.create(db, replace(new_key(2), public_id=first.public_id))


async def test_many_keys_are_found_by_their_public_ids(db: Connection, add_key: AddKey) -> None:
    one, two = await add_key(1), await add_key(2)

    found = await keys.find_by_public_id(db, [two.public_id, one.public_id, "unknown"])

    assert found == {one.public_id: one, two.public_id: two}


@pytest.mark.parametrize(
    ("expires_at", "live"),
    [
        pytest.param(FAR, True, id="not yet"),
        pytest.param(PAST, False, id="over"),
    ],
)
async def test_the_clock_of_the_database_ends_a_key(
    add_key: AddKey, expires_at: datetime, live: bool
) -> None:
    assert (await add_key(1, expires_at=expires_at)).live is live


async def test_keys_are_listed_newest_first(db: Connection, add_key: AddKey) -> None:
    for number in (1, 2, 3):
        await add_key(number)

    assert [key.id.int for key in await keys.list_all(db)] == [3, 2, 1]
    assert [key.id.int for key in await keys.list_all(db, limit=1)] == [3]


async def test_a_change_sets_what_it_names_and_nothing_else(db: Connection, add_key: AddKey) -> None:
    before = await add_key(1, rate=5, burst=9, types=["echo"])

    after = await keys.change(db, before.id, {"rate": Decimal("2.5"), "types": None, "scopes": ["jobs:read"]})

    assert after == replace(before, rate=Decimal("2.5"), types=None, scopes=["jobs:read"])


async def test_no_change_is_a_change_too(db: Connection, add_key: AddKey) -> None:
    before = await add_key(1)

    assert await keys.change(db, before.id, {}) == before
    assert await keys.change(db, UUID(int=99), {}) is None


async def test_the_secret_part_of_a_key_can_not_be_changed(db: Connection) -> None:
    with pytest.raises(ValueError, match="digest"):
        await keys.change(db, UUID(int=1), {"digest": b""})


async def test_a_revoked_key_is_dead_and_stays_listed(db: Connection, add_key: AddKey) -> None:
    key = await add_key(1)

    revoked = await keys.revoke(db, key.id)
    again = await keys.revoke(db, key.id)

    assert revoked is not None
    assert revoked.revoked_at is not None
    assert not revoked.live
    assert again == revoked
    assert await keys.list_all(db) == [revoked]
    assert await keys.revoke(db, UUID(int=99)) is None


async def rotate(db: Connection, old: UUID, number: int, overlap: timedelta) -> StoredKey | None:
    new = new_key(number)
    return await keys.rotate(
        db,
        old,
        key_id=new.id,
        public_id=new.public_id,
        digest=new.digest,
        pepper_version=0,
        fingerprint=new.fingerprint,
        overlap=overlap,
    )


async def test_rotate_keeps_client_and_rights_and_ends_the_old_key(db: Connection, add_key: AddKey) -> None:
    old = await add_key(1, types=["echo"], rate=5, burst=2, max_pending=3)

    new = await rotate(db, old.id, 2, timedelta(hours=24))
    ended = await keys.get(db, old.id)

    assert new is not None
    assert ended is not None
    assert (new.client, new.name, new.prefix, new.scopes) == (old.client, old.name, old.prefix, old.scopes)
    assert (new.types, new.rate, new.burst, new.max_pending) == (["echo"], Decimal(5), 2, 3)
    assert (new.live, new.expires_at, new.digest) == (True, None, new_key(2).digest)
    assert ended.live
    assert ended.expires_at is not None
    assert abs(ended.expires_at - new.created_at - timedelta(hours=24)) < timedelta(minutes=1)


async def test_rotate_without_overlap_ends_the_old_key_at_once(db: Connection, add_key: AddKey) -> None:
    old = await add_key(1)

    await rotate(db, old.id, 2, timedelta())
    ended = await keys.get(db, old.id)

    assert ended is not None
    assert not ended.live


async def test_rotate_never_makes_a_key_live_longer(db: Connection, add_key: AddKey) -> None:
    soon = datetime.now(UTC) + timedelta(minutes=5)
    old = await add_key(1, expires_at=soon)

    await rotate(db, old.id, 2, timedelta(days=30))
    kept = await keys.get(db, old.id)

    assert kept is not None
    assert kept.expires_at == old.expires_at


async def test_a_dead_key_is_not_rotated(db: Connection, add_key: AddKey) -> None:
    revoked, expired = await add_key(1), await add_key(2, expires_at=PAST)
    await keys.revoke(db, revoked.id)

    assert await rotate(db, revoked.id, 3, timedelta(hours=1)) is None
    assert await rotate(db, expired.id, 4, timedelta(hours=1)) is None
    assert len(await keys.list_all(db)) == 2


async def test_last_use_is_written_for_many_and_at_most_once_a_minute(
    db: Connection, add_key: AddKey
) -> None:
    one, two, unused = await add_key(1), await add_key(2), await add_key(3)

    await keys.touch_last_used(db, [two.id, one.id, UUID(int=99)])
    first = {key.id: key.last_used_at for key in await keys.list_all(db)}
    await keys.touch_last_used(db, [one.id, two.id])
    second = {key.id: key.last_used_at for key in await keys.list_all(db)}

    assert first[one.id] is not None
    assert first[two.id] is not None
    assert first[unused.id] is None
    assert second == first


async def test_the_digest_is_not_in_the_repr(add_key: AddKey) -> None:
    assert "digest" not in repr(await add_key(1))
