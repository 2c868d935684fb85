from __future__ import annotations

import psycopg
import pytest

from tests.postgres import DurablePG, Server, crash


async def _tables(db: psycopg.AsyncConnection) -> int:
    cursor = await db.execute("select count(*) from pg_tables where tablename = 'left_over'")
    row = await cursor.fetchone()
    assert row is not None
    return int(row[0])


@pytest.mark.parametrize("which", ["first", "second"])
async def test_every_test_has_a_database_for_itself(db: psycopg.AsyncConnection, which: str) -> None:
    before = await _tables(db)

    await db.execute("create table left_over ()")

    assert before == 0
    assert await _tables(db) == 1


def test_the_database_of_a_test_is_migrated(database_url: str) -> None:
    with psycopg.connect(database_url) as connection:
        row = connection.execute("select to_regclass('taskd.jobs') is not null").fetchone()

    assert row == (True,)


def test_an_empty_database_is_not_migrated(empty_database_url: str) -> None:
    with psycopg.connect(empty_database_url) as connection:
        row = connection.execute("select to_regnamespace('taskd') is null").fetchone()

    assert row == (True,)


def test_what_a_durable_server_acknowledged_survives_a_crash(durable_pg: DurablePG) -> None:
    server = durable_pg()
    with psycopg.connect(server.url(), autocommit=True) as connection:
        connection.execute("create table kept as select 7 as n")

    crash(server)
    server.start()

    with psycopg.connect(server.url()) as connection:
        assert connection.execute("select n from kept").fetchone() == (7,)


def test_url_quotes_what_needs_it() -> None:
    server = Server(host="/a b", user="u@x", password="p/w")

    assert server.url("d") == "postgresql://u%40x:p%2Fw@/d?host=/a%20b&port=5432"
