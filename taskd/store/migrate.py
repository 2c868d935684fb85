"""Brings the schema of a database to the version of this package.

Plain numbered files in `sql/migrations/`, forward only. One runner at a time (a transaction-level
advisory lock), each file in a transaction of its own with a `lock_timeout`, so that a migration that
can't get its lock gives up instead of stopping everybody behind it. Running again is always safe.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, LiteralString

import psycopg
from psycopg import sql

from taskd.errors import SchemaMismatch
from taskd.store.queries import DEFAULT_SCHEMA, for_schema
from taskd.store.sqlstate import store_errors

LOCK_TIMEOUT = "2s"
_FILE = re.compile(r"^(\d{4})_([a-z0-9_]+)\.sql$")
_RUNNER = 0x7461736B64  # "taskd": the key of the advisory lock


@dataclass(frozen=True, slots=True)
class Migration:
    """One numbered file. `digest` is the SHA-256 of its text, kept to notice edited files."""

    version: int
    name: str
    text: str
    digest: str


@dataclass(frozen=True, slots=True)
class Status:
    """What the database has and what is still to come."""

    applied: tuple[int, ...]
    pending: tuple[Migration, ...]
    edited: tuple[int, ...]
    """Applied migrations whose file is not the one that ran."""
    newer: tuple[int, ...]
    """Versions in the database that this package does not know."""


def migrations() -> list[Migration]:
    """Return all migrations of this package in order."""
    found = []
    for file in files("taskd.sql.migrations").iterdir():
        if match := _FILE.match(file.name):
            text = file.read_text(encoding="utf-8")
            digest = hashlib.sha256(text.encode()).hexdigest()
            found.append(Migration(int(match[1]), match[2], text, digest))
    return sorted(found, key=lambda migration: migration.version)


def status(url: str, *, schema: str = DEFAULT_SCHEMA) -> Status:
    """Compare the database with this package; changes nothing.

    Raises:
        StoreUnavailable: the database does not answer.
    """
    with store_errors(), psycopg.connect(url, autocommit=True, connect_timeout=5) as conn:
        return _compare(conn, schema)


def up(url: str, *, schema: str = DEFAULT_SCHEMA) -> list[Migration]:
    """Apply what is missing, in order, and return it; empty when nothing was.

    Raises:
        StoreUnavailable: the database does not answer, or a lock was not to be had in `LOCK_TIMEOUT`.
        SchemaMismatch: the database is newer than this package, or an applied file was edited.
    """
    done: list[Migration] = []
    with store_errors(), psycopg.connect(url, autocommit=True, connect_timeout=5) as conn:
        while True:
            with conn.transaction():
                conn.execute("select pg_advisory_xact_lock(%s)", (_RUNNER,))
                _prepare(conn, schema)
                state = _compare(conn, schema)
                if state.edited or state.newer:
                    raise SchemaMismatch(_mismatch(state))
                if not state.pending:
                    return done
                migration = state.pending[0]
                conn.execute(sql.SQL("set local lock_timeout = {}").format(LOCK_TIMEOUT))
                conn.execute("set local client_min_messages = warning")
                try:
                    conn.execute(for_schema(migration.text, schema).encode())
                except psycopg.Error as error:
                    error.add_note(f"in migration {migration.version:04}_{migration.name}")
                    raise
                conn.execute(
                    _in(schema, "insert into {}.migrations (version, name, digest) values (%s, %s, %s)"),
                    (migration.version, migration.name, migration.digest),
                )
            done.append(migration)


def check(url: str, *, schema: str = DEFAULT_SCHEMA) -> None:
    """Raise `SchemaMismatch` unless the database has every migration of this package."""
    state = status(url, schema=schema)
    if state.edited or state.newer or state.pending:
        raise SchemaMismatch(_mismatch(state))


async def check_on(conn: psycopg.AsyncConnection[Any], *, schema: str = DEFAULT_SCHEMA) -> None:
    """As `check`, on an open connection."""
    with store_errors():
        cursor = await conn.execute("select to_regclass(%s) is not null", (f"{schema}.migrations",))
        row = await cursor.fetchone()
        there: dict[int, str] = {}
        if row and row[0]:
            cursor = await conn.execute(
                _in(schema, "select version, digest from {}.migrations order by version")
            )
            there = dict(await cursor.fetchall())
    state = _state(there)
    if state.edited or state.newer or state.pending:
        raise SchemaMismatch(_mismatch(state))


def _mismatch(state: Status) -> str:
    if state.newer:
        return f"the database has migration {state.newer[-1]}, which this taskd does not know: upgrade taskd"
    if state.edited:
        return f"migration {state.edited[0]} in the database is not the file of this package: reinstall taskd"
    return f"{len(state.pending)} migration(s) are missing: run `taskd migrate`"


def _in(schema: str, text: LiteralString) -> sql.Composed:
    return sql.SQL(text).format(sql.Identifier(schema))


def _prepare(conn: psycopg.Connection[tuple[object, ...]], schema: str) -> None:
    # Only where it is missing: to be allowed to make schemas is a right that nobody needs afterwards.
    if conn.execute("select to_regnamespace(%s) is null", (schema,)).fetchone() == (True,):
        conn.execute(_in(schema, "create schema if not exists {}"))
    conn.execute(
        _in(
            schema,
            """create table if not exists {}.migrations (
                version integer primary key, name text not null, digest text not null,
                applied_at timestamptz not null default clock_timestamp())""",
        )
    )


def _compare(conn: psycopg.Connection[tuple[object, ...]], schema: str) -> Status:
    there: dict[int, str] = {}
    found = conn.execute("select to_regclass(%s) is not null", (f"{schema}.migrations",)).fetchone()
    if found and found[0]:
        rows = conn.execute(
            _in(schema, "select version, digest from {}.migrations order by version")
        ).fetchall()
        there = {int(str(version)): str(digest) for version, digest in rows}
    return _state(there)


def _state(there: dict[int, str]) -> Status:
    known = {migration.version: migration for migration in migrations()}
    return Status(
        applied=tuple(there),
        pending=tuple(migration for version, migration in known.items() if version not in there),
        edited=tuple(v for v, digest in there.items() if v in known and known[v].digest != digest),
        newer=tuple(v for v in there if v not in known),
    )
