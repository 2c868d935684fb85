"""Every hostile request of the tables in `tests/data/cases`, against a real server on a real database."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from typing import Any

import psycopg
import pytest

from tests.api.cases import World, judge, load, make_world, send
from tests.api.server import count_jobs, make_key

CASES = load("bad_http.json")
MORE = load("more_http.json")

LATER = {
    "wh-decimal": "the webhook type comes with a later version",
    "wh-short": "the webhook type comes with a later version",
    "wh-v6": "the webhook type comes with a later version",
    "wh-userinfo": "the webhook type comes with a later version",
}
ELSEWHERE = {
    "st-db-hang": "test_outages: needs a database of its own to freeze",
    "st-db-readonly": "test_outages: needs a database of its own to demote",
    "st-draining": "test_serve: ends its server",
    "st-badkey-flood": "test_keys: would refuse the wrong keys of the other cases",
}
HERE = [case_id for case_id in CASES if case_id not in LATER | ELSEWHERE]


@pytest.fixture
async def world(database_url: str) -> AsyncIterator[World]:
    async with make_world(database_url) as world:
        yield world


@pytest.fixture
async def impatient_world(database_url: str) -> AsyncIterator[World]:
    async with make_world(database_url, request_timeout_s=1.0) as world:
        yield world


async def test_every_case_gets_its_answer(world: World) -> None:
    wrong: list[str] = []
    async with await psycopg.AsyncConnection.connect(world.url, autocommit=True) as db:
        for case_id in HERE:
            case = CASES[case_id]
            world.fixtures["{KEY}"] = world.key
            await _set_up(world, db, case_id)
            before = await count_jobs(db)
            began = time.monotonic()
            status, headers, raw = send(world, case["request"])
            took_s = time.monotonic() - began
            stored = await count_jobs(db) - before
            wrong += [
                f"{case_id}: {problem}"
                for problem in judge(world, case, status, headers, raw, stored, took_s)
            ]

    assert wrong == []
    assert world.server.children() == world.children


def test_every_case_is_run_or_named() -> None:
    assert set(LATER) | set(ELSEWHERE) <= set(CASES)


async def test_every_further_case_gets_its_answer(impatient_world: World) -> None:
    world, wrong = impatient_world, []
    stored = 0
    async with await psycopg.AsyncConnection.connect(world.url, autocommit=True) as db:
        before = await count_jobs(db)
        for case in MORE.values():
            began = time.monotonic()
            status, headers, raw = send(world, case["request"])
            took_s = time.monotonic() - began
            rows = case["expect"]["jobs_stored"]
            wrong += [
                f"{case['id']}: {problem}"
                for problem in judge(world, case, status, headers, raw, rows, took_s)
            ]
            stored += rows
        added = await count_jobs(db) - before

    assert wrong == []
    assert added == stored
    assert world.server.children() == world.children


async def _set_up(world: World, db: psycopg.AsyncConnection[Any], case_id: str) -> None:
    body: dict[str, Any] = {"type": "echo", "payload": {}}
    if case_id == "st-unique-same":
        first = json.loads(CASES[case_id]["request"]["body_text"])
        assert world.server.send("POST", "/jobs", key=world.fixtures["{KEY}"], body=first).status == 200
    elif case_id == "st-unique-other-client":
        body["unique_key"] = "k3"
        assert world.server.send("POST", "/jobs", key=world.fixtures["{KEY_OTHER}"], body=body).status == 200
    elif case_id in ("st-rate", "st-rate-before-body"):
        world.fixtures["{KEY}"], _ = await make_key(db, rate=1, burst=10)
        statuses = [
            world.server.send("POST", "/jobs", key=world.fixtures["{KEY}"], body=body).status
            for _ in range(10)
        ]
        assert statuses == [200] * 10
