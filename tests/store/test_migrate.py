"""Migrations: run again, run twice at once, killed in the middle, edited, newer than the package."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import psycopg
import pytest

from taskd.errors import BadRow, SchemaMismatch, StoreUnavailable
from taskd.store import migrate
from taskd.store.migrate import Migration
from taskd.store.queries import Statements


def versions(found: Sequence[Migration]) -> list[int]:
    return [one.version for one in found]


ALL = versions(migrate.migrations())


def with_another(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Give the package one migration more."""
    known = migrate.migrations()
    more = [*known, Migration(known[-1].version + 1, "more", text, "digest")]
    monkeypatch.setattr(migrate, "migrations", lambda: more)


def run(url: str, statement: str) -> list[tuple[object, ...]]:
    with psycopg.connect(url, autocommit=True) as conn:
        cursor = conn.execute(statement.encode())
        return cursor.fetchall() if cursor.description else []


def test_versions_count_from_one_without_a_gap() -> None:
    assert list(range(1, len(ALL) + 1)) == ALL


def test_an_empty_database_gets_everything_and_then_nothing_more(empty_database_url: str) -> None:
    assert versions(migrate.up(empty_database_url)) == ALL
    assert migrate.up(empty_database_url) == []
    migrate.check(empty_database_url)


def test_status_tells_what_is_to_come_and_changes_nothing(empty_database_url: str) -> None:
    status = migrate.status(empty_database_url)

    assert (status.applied, versions(status.pending)) == ((), ALL)
    assert run(empty_database_url, "select 1 from pg_namespace where nspname = 'taskd'") == []
    with pytest.raises(SchemaMismatch, match="run `taskd migrate`"):
        migrate.check(empty_database_url)


def test_two_runners_at_once_run_each_migration_once(empty_database_url: str) -> None:
    done: list[list[int]] = []
    barrier = threading.Barrier(3)

    def work() -> None:
        barrier.wait()
        done.append(versions(migrate.up(empty_database_url)))

    runners = [threading.Thread(target=work) for _ in range(3)]
    for runner in runners:
        runner.start()
    for runner in runners:
        runner.join()

    assert sorted(version for one in done for version in one) == ALL


def test_a_migration_that_fails_leaves_nothing_and_runs_again(
    empty_database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        with_another(broken, "create table taskd.half (); select 1 / 0;")
        with pytest.raises(BadRow):
            migrate.up(empty_database_url)

    assert migrate.status(empty_database_url).applied == tuple(ALL)
    assert run(empty_database_url, "select to_regclass('taskd.half')") == [(None,)]
    with_another(monkeypatch, "create table taskd.whole ()")
    assert versions(migrate.up(empty_database_url)) == [ALL[-1] + 1]


def test_a_runner_that_is_killed_in_the_middle_leaves_nothing_and_runs_again(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = "create table taskd.half (); select pg_terminate_backend(pg_backend_pid());"
    with monkeypatch.context() as broken:
        with_another(broken, killed)
        with pytest.raises(StoreUnavailable):
            migrate.up(database_url)

    assert run(database_url, "select to_regclass('taskd.half')") == [(None,)]
    with_another(monkeypatch, "create table taskd.half ()")
    assert versions(migrate.up(database_url)) == [ALL[-1] + 1]


def test_a_lock_that_is_not_to_be_had_gives_up_and_changes_nothing(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migrate, "LOCK_TIMEOUT", "50ms")
    with_another(monkeypatch, "alter table taskd.jobs add column more text")

    with psycopg.connect(database_url) as other:
        other.execute("lock table taskd.jobs in access share mode")
        with pytest.raises(StoreUnavailable):
            migrate.up(database_url)

    assert migrate.status(database_url).applied == tuple(ALL)


def test_an_edited_file_is_noticed(database_url: str) -> None:
    run(database_url, "update taskd.migrations set digest = 'other' where version = 1")

    assert migrate.status(database_url).edited == (1,)
    for call in (migrate.up, migrate.check):
        with pytest.raises(SchemaMismatch, match="migration 1 in the database is not the file"):
            call(database_url)


def test_a_database_that_is_newer_is_left_alone(database_url: str) -> None:
    run(database_url, "insert into taskd.migrations (version, name, digest) values (999, 'n', 'd')")

    assert migrate.status(database_url).newer == (999,)
    with pytest.raises(SchemaMismatch, match="999"):
        migrate.up(database_url)


async def test_an_open_connection_can_be_checked(
    db: psycopg.AsyncConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    await migrate.check_on(db)

    with_another(monkeypatch, "")
    with pytest.raises(SchemaMismatch):
        await migrate.check_on(db)


def test_another_schema_holds_everything_and_the_usual_one_nothing(empty_database_url: str) -> None:
    migrate.up(empty_database_url, schema="jobs_of_ours")

    migrate.check(empty_database_url, schema="jobs_of_ours")
    assert run(empty_database_url, "select 1 from pg_namespace where nspname = 'taskd'") == []
    left = run(empty_database_url, "select proname from pg_proc where prosrc ~ 'taskd[.]'")
    assert left == []


def test_statements_follow_the_schema(empty_database_url: str) -> None:
    migrate.up(empty_database_url, schema="jobs_of_ours")
    statements = Statements()
    statements.use_schema("jobs_of_ours")

    assert not [name for name, text in statements.items() if "taskd." in text]
    run(empty_database_url, statements["set_limits"])
    assert run(empty_database_url, statements["known_types"]) == []


def test_an_unreachable_database_says_so() -> None:
    with pytest.raises(StoreUnavailable):
        migrate.status("postgresql://x@127.0.0.1:1/x")
