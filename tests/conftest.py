"""What all tests share: the database fixtures of `tests/postgres.py`."""

from __future__ import annotations

import signal

import pytest

from tests.postgres import database_url, db, durable_pg, empty_database_url, pg, template

__all__ = ["database_url", "db", "durable_pg", "empty_database_url", "pg", "template"]


def pytest_configure(config: pytest.Config) -> None:
    """End as Ctrl-C does when asked to by SIGTERM: fixtures stop what they started."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
