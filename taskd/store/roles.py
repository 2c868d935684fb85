"""Makes the database roles of `sql/roles.sql` and gives each what it needs, no more.

Applied after `migrate.up`, every time: rights of what a migration made are given there and nowhere else.
"""

from __future__ import annotations

from importlib.resources import files

import psycopg

from taskd.store.queries import DEFAULT_SCHEMA, for_schema
from taskd.store.sqlstate import store_errors

OWNER = "taskd_owner"
"""Owns the schema; migrations run as it or as a member of it."""
API = "taskd_api"
WORKER = "taskd_worker"
SUBMIT = "taskd_submit"
"""Applications that submit by SQL."""
READ_ONLY = "taskd_ro"


def text(schema: str = DEFAULT_SCHEMA) -> str:
    """Return the SQL that `apply` runs."""
    return for_schema(files("taskd.sql").joinpath("roles.sql").read_text(encoding="utf-8"), schema)


def apply(url: str, *, schema: str = DEFAULT_SCHEMA) -> list[str]:
    """Make the roles that are missing and set the rights of all anew, in one transaction.

    `url` is that of a superuser or of a role with CREATEROLE that owns schema and database; once the roles
    are there, of any member of `taskd_owner`. Returns what the server warned of; empty when all is well.

    Raises:
        StoreUnavailable: the database does not answer, a lock was not to be had in two seconds, or the
            role of `url` has no right to do this (42501).
        SchemaMismatch: the schema is not there, or not at this package's version.
    """
    warnings: list[str] = []

    def note(notice: psycopg.errors.Diagnostic) -> None:
        if notice.severity_nonlocalized == "WARNING":
            warnings.append(notice.message_primary or "")

    with store_errors(), psycopg.connect(url, connect_timeout=5) as conn:
        conn.add_notice_handler(note)
        conn.execute(text(schema).encode())
    return warnings


def in_use(url: str, *, schema: str = DEFAULT_SCHEMA) -> bool:
    """Return whether `apply` has run here: then it must run after each migration.

    Raises:
        StoreUnavailable: the database does not answer.
    """
    with store_errors(), psycopg.connect(url, autocommit=True, connect_timeout=5) as conn:
        row = conn.execute(
            "select from pg_namespace where nspname = %s and nspowner = to_regrole(%s)", (schema, OWNER)
        ).fetchone()
    return row is not None
