"""What all tests share: the database fixtures of `tests/postgres.py`."""

from __future__ import annotations

from tests.postgres import database_url, db, durable_pg, empty_database_url, pg, template

__all__ = ["database_url", "db", "durable_pg", "empty_database_url", "pg", "template"]
