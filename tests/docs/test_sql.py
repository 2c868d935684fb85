"""The page about SQL is that of the functions, and its examples run."""

from __future__ import annotations

import re
from collections.abc import Iterator

import psycopg
import pytest

from tests.docs import manual

PAGE = manual.text("docs/use/sql.md")
Shop = psycopg.Connection[tuple[object, ...]]

LATER = {"type", "payload", "jobs"}
"""Arguments that the page names in the head of the functions and not in the table."""


@pytest.fixture
def shop(database_url: str) -> Iterator[Shop]:
    """A database with the tables of the examples and a published job type."""
    with psycopg.connect(database_url, autocommit=True) as conn:
        conn.execute("insert into taskd.types (type, info) values ('send_email', '{}')")
        conn.execute("create table orders (id integer, customer text)")
        conn.execute("create table customers (email text)")
        conn.execute("insert into customers values ('ada@example.org'), ('joe@example.org')")
        yield conn


def test_the_examples_submit_what_they_say(shop: Shop) -> None:
    for example in manual.blocks("docs/use/sql.md", "sql"):
        shop.execute(example.encode())

    kept = shop.execute("select unique_key, type from taskd.jobs order by unique_key").fetchall()
    assert kept == [("order-4711", "send_email"), (None, "send_email"), (None, "send_email")]


@pytest.mark.parametrize("function", ["submit", "submit_many"])
def test_each_argument_of_a_function_is_explained(shop: Shop, function: str) -> None:
    asked = "select pg_get_function_identity_arguments(%s::regproc)"

    found = shop.execute(asked, (f"taskd.{function}",)).fetchone()

    assert found is not None
    for name in re.findall(r"(?:^|, )(\w+) ", str(found[0])):
        assert name in LATER or f"| `{name}` |" in PAGE
