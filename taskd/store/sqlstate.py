"""What a Postgres error means for whoever sent the statement: decided here and nowhere else.

Classes of SQLSTATE: https://www.postgresql.org/docs/current/errcodes-appendix.html
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import psycopg

from taskd.errors import BadRow, SchemaMismatch, StoreUnavailable, TaskdError, Unforeseen

_BAD_ROW = ("22", "23", "54")
_MISSING = frozenset({"3F000", "42P01", "42883", "42703"})
"""Schema, table, function or column is not there: not migrated, or by another version."""
_CLOSE = frozenset({"25006", "57P01", "57P02", "57P03", "57P05"})


_OF_THE_SERVER = frozenset({"GetNewTransactionId", "GetNewMultiXactId", "PreCommit_Notify"})
"""The functions of the server whose 54000 is about no row: it has run out of transaction numbers until it is
vacuumed, or its NOTIFY queue is full. Their names are the same in every language of messages."""


def closes(error: psycopg.Error) -> bool:
    """Whether the connection must not be used again: a demoted primary, a server that goes away."""
    return error.sqlstate in _CLOSE or error.sqlstate is None


def cause(error: TaskdError) -> str:
    """Return the SQLSTATE behind `error`, else the name of its class: what tells one trouble from another."""
    state = getattr(error.__cause__, "sqlstate", None)
    return state if isinstance(state, str) else type(error).__name__


def translate(error: psycopg.Error) -> BadRow | StoreUnavailable | Unforeseen:
    """Return what `error` means to the caller.

    Everything that may pass by itself (classes 08, 25, 40, 53, 55, 57, 58, XX and a broken connection)
    is `StoreUnavailable`; a refusal for the content of a row is `BadRow`; the rest is `Unforeseen`.
    """
    state = error.sqlstate
    if state is None and isinstance(error, psycopg.DataError):
        # The driver's own refusal, of a NUL in a text: nothing was sent, and it never passes by itself.
        return BadRow(_first_line(error), sqlstate="22021")
    if state is None:
        return StoreUnavailable(f"no answer from Postgres: {_first_line(error)}")
    if state in _MISSING:
        return SchemaMismatch(
            f"the database has no schema for this version of taskd ({state}): run `taskd migrate`"
        )
    if error.diag.source_function in _OF_THE_SERVER:
        return StoreUnavailable(f"Postgres takes no writes now ({state}): {_first_line(error)}")
    if state.startswith(_BAD_ROW):
        return BadRow(_first_line(error), sqlstate=state)
    if state.startswith(("08", "25", "28", "3D", "40", "53", "55", "57", "58", "XX", "42501")):
        return StoreUnavailable(f"Postgres answered {state}: {_first_line(error)}")
    return Unforeseen(f"Postgres answered {state}: {_first_line(error)}")


def _first_line(error: psycopg.Error) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextmanager
def store_errors() -> Iterator[None]:
    """Turn psycopg's errors into taskd's while keeping the original as the cause."""
    try:
        yield
    except psycopg.Error as error:
        raise translate(error) from error
