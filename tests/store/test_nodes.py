"""Nodes, their leases, and the types that they publish."""

from __future__ import annotations

import time
from datetime import timedelta

import psycopg
import pytest

from taskd.model.jobtype import TypeInfo
from taskd.store import leases, nodes, types
from tests.factories import Connection, add_node, end_lease, one, publish


async def test_a_lease_runs_from_the_registration_by_the_database_clock(db: Connection) -> None:
    node = await add_node(db, "n1", lease_s=30)

    left = await one(db, "select lease_until - heartbeat_at from taskd.nodes where id = %s", node)

    assert left == pytest.approx(timedelta(seconds=30), abs=timedelta(seconds=1))


async def test_every_start_is_an_incarnation_of_its_own(db: Connection) -> None:
    assert await add_node(db, "same") != await add_node(db, "same")


async def test_a_heartbeat_renews_the_lease_and_tells_the_state(db: Connection) -> None:
    node = await add_node(db)
    await end_lease(db, node)

    assert await nodes.heartbeat(db, node=node, state="draining", info='{"held": 3}')

    row = await one(
        db,
        "select lease_until > clock_timestamp(), state, info->>'held' from taskd.nodes where id = %s",
        node,
    )
    assert row == (True, "draining", "3")


@pytest.mark.parametrize("how", ["rescued", "good-bye"])
async def test_a_node_that_has_ended_never_beats_again(db: Connection, how: str) -> None:
    node = await add_node(db)
    if how == "rescued":
        await leases.rescue_named(db, nodes=[node], cause="lease_expired", error="e")
    else:
        await nodes.end(db, node=node)

    assert not await nodes.heartbeat(db, node=node, state="live", info="{}")


async def test_a_node_that_said_good_bye_is_not_rescued_and_publishes_nothing(db: Connection) -> None:
    node = await add_node(db)
    await publish(db, node, "mail")
    await nodes.end(db, node=node)
    await end_lease(db, node)

    assert await leases.rescue_lost(db) == {}
    [known] = await types.known(db)
    assert known.live == ()


async def test_nodes_that_ended_long_ago_are_forgotten(db: Connection) -> None:
    gone, live = await add_node(db, "gone"), await add_node(db, "live")
    await nodes.end(db, node=gone)

    await nodes.forget(db, age=timedelta(days=1))
    assert len(await nodes.list_(db)) == 2
    await nodes.forget(db, age=timedelta(seconds=-1))

    assert [node.id for node in await nodes.list_(db)] == [live]


async def test_a_list_shows_the_newest_first_with_its_types(db: Connection) -> None:
    first, second = await add_node(db, "first"), await add_node(db, "second")
    await publish(db, second, "mail", "echo")

    listed = await nodes.list_(db)

    assert [(node.id, list(node.types)) for node in listed] == [(second, ["echo", "mail"]), (first, [])]


async def test_the_newest_publication_decides_and_every_live_one_is_told(db: Connection) -> None:
    first, second = await add_node(db, "a"), await add_node(db, "b")
    await publish(db, first, "mail", priority=1)
    await publish(db, second, "mail", priority=2)

    [known] = await types.known(db)

    assert known.info == TypeInfo(name="mail", handler="mail", plugin="test", priority=2)
    assert sorted(info.priority for info in known.live) == [1, 2]


async def test_a_type_without_a_live_node_stays_known(db: Connection) -> None:
    node = await add_node(db)
    await publish(db, node, "mail")
    await end_lease(db, node)

    [known] = await types.known(db)

    assert (known.info.name, known.live, known.retired, known.paused) == ("mail", (), False, False)


async def test_types_can_be_published_by_nobody(db: Connection) -> None:
    await publish(db, None, "mail")

    [known] = await types.known(db)

    assert known.live == ()


async def test_a_server_with_safe_settings_has_no_complaints(db: Connection) -> None:
    await db.execute("set synchronous_commit = on")
    facts = await nodes.server_facts(db)

    complaints = [line for line in facts.unsafe() if not line.startswith(("fsync", "full_page_writes"))]
    assert complaints == []


@pytest.mark.parametrize(
    ("unsafe", "complaint"),
    [
        pytest.param("set synchronous_commit = off", "synchronous_commit is off", id="commit"),
        pytest.param("alter table taskd.queue set unlogged", "a table of taskd is not permanent", id="table"),
    ],
)
async def test_what_can_lose_jobs_is_named_with_what_to_set(
    db: Connection, unsafe: str, complaint: str
) -> None:
    await db.execute(unsafe.encode())

    facts = await nodes.server_facts(db)

    assert any(line.startswith(complaint) for line in facts.unsafe())


async def test_a_primary_says_which_of_its_lives_this_is(db: Connection) -> None:
    assert await nodes.timeline(db) == "00000001"


async def test_a_server_with_numbers_left_says_how_many(db: Connection) -> None:
    used = await one(db, "select max(age(datfrozenxid)) from pg_database")

    assert (await nodes.server_facts(db)).numbers_left <= 2**31 - 1 - 3_000_000 - used


async def test_vitals_tell_of_a_transaction_that_holds_vacuum_back(db: Connection, database_url: str) -> None:
    async def oldest_s() -> float:
        return (await nodes.vitals(db)).oldest_snapshot_s

    for begins in ("select 1", "select pg_current_xact_id()"):
        async with await psycopg.AsyncConnection.connect(database_url) as other:
            await other.set_isolation_level(
                psycopg.IsolationLevel.REPEATABLE_READ
                if begins == "select 1"
                else psycopg.IsolationLevel.READ_COMMITTED
            )
            await other.execute(begins.encode())
            began = time.monotonic()
            while await oldest_s() < 0.2:
                assert time.monotonic() - began < 10
            await other.rollback()
        assert await oldest_s() < 5
