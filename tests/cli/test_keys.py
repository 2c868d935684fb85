"""`taskd keys`, `taskd audit`: the same service as over HTTP, on the database itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner, Result

from taskd.cli import main

Invoke = Callable[..., Result]


@pytest.fixture
def invoke(runner: CliRunner, config_file: Path) -> Invoke:
    """Run a command on the test's database."""

    def run(*words: str) -> Result:
        return runner.invoke(main, ["--config", str(config_file), *words])

    return run


def make(invoke: Invoke, *words: str) -> dict[str, Any]:
    made: dict[str, Any] = json.loads(invoke("keys", "create", "mine", *words, "--json").stdout)
    return made


def test_a_key_is_made_with_all_that_can_be_said(invoke: Invoke) -> None:
    made = make(
        invoke,
        *("--scope", "jobs:read", "--scope", "jobs:cancel", "--type", "mail", "--type", "echo"),
        *("--rate", "0.5", "--burst", "7", "--max-pending", "9", "--expires", "90d", "--description", "d"),
    )

    assert made["scopes"] == ["jobs:read", "jobs:cancel"]
    assert made["types"] == ["mail", "echo"]
    assert made["rate_limit"] == {"rate": 0.5, "burst": 7}
    assert (made["max_pending"], made["description"]) == (9, "d")
    ends = datetime.fromisoformat(made["expires_at"])
    assert abs(ends - datetime.now(UTC) - timedelta(days=90)) < timedelta(minutes=1)


@pytest.mark.parametrize("when", ["soon", "2001-01-01T00:00:00Z", "90"], ids=["no form", "passed", "no unit"])
def test_a_wrong_end_is_refused(invoke: Invoke, when: str) -> None:
    done = invoke("keys", "create", "mine", "--expires", when)

    assert done.exit_code == 1
    assert "expires_at: " in done.stderr


def test_a_change_sets_and_clears_what_is_named(invoke: Invoke) -> None:
    made = make(invoke, "--rate", "5", "--burst", "6", "--type", "mail", "--max-pending", "3")

    done = invoke(
        *("keys", "change", made["id"], "--name", "yours", "--burst", "8"),
        *("--clear", "rate", "--clear", "types", "--json"),
    )

    changed = json.loads(done.stdout)
    assert (changed["name"], changed["types"], changed["max_pending"]) == ("yours", None, 3)
    assert changed["rate_limit"] == {"rate": None, "burst": 8}


@pytest.mark.parametrize(
    "words",
    [
        pytest.param([], id="nothing to change"),
        pytest.param(["--rate", "5", "--clear", "rate"], id="set and cleared"),
        pytest.param(["--clear", "name"], id="a key has a name"),
    ],
)
def test_a_change_that_says_nothing_or_too_much_is_wrong_usage(invoke: Invoke, words: list[str]) -> None:
    made = make(invoke)

    assert invoke("keys", "change", made["id"], *words).exit_code == 2


def test_rotate_prints_the_new_key_alone_and_ends_the_old_one(invoke: Invoke) -> None:
    made = make(invoke, "--scope", "jobs:read")

    done = invoke("keys", "rotate", made["id"], "--overlap", "0s")

    assert done.exit_code == 0
    assert len(done.stdout.split()) == 1
    assert done.stdout.strip() != made["key"]
    listed = {key["id"]: key for key in json.loads(invoke("keys", "list", "--json").stdout)}
    (new,) = (key for key in listed.values() if key["rotated_from"] == made["id"])
    assert (new["client"], new["scopes"]) == (made["client"], ["jobs:read"])
    assert " expired " in invoke("keys", "list").stdout


def test_a_second_rotation_waits_for_the_end_of_the_first(invoke: Invoke) -> None:
    made = make(invoke)
    assert invoke("keys", "rotate", made["id"]).exit_code == 0

    again = invoke("keys", "rotate", made["id"])

    assert again.exit_code == 1
    assert "rotation before is not over" in again.stderr


def test_the_audit_says_who_did_what_newest_first(invoke: Invoke) -> None:
    made = make(invoke)
    invoke("keys", "change", made["id"], "--name", "yours")
    invoke("keys", "rotate", made["id"])
    invoke("keys", "revoke", made["id"])

    entries = json.loads(invoke("audit", "--json").stdout)
    older = json.loads(invoke("audit", "--json", "--before", entries[1]["id"], "--limit", "1").stdout)

    assert [entry["action"] for entry in entries] == ["key.revoke", "key.rotate", "key.change", "key.create"]
    assert all(entry["actor"].startswith("cli:") for entry in entries)
    assert {entry["target"] for entry in entries} == {made["id"]}
    assert older == [entries[2]]
    assert invoke("audit").stdout.splitlines()[0].split()[:4] == ["ID", "AT", "ACTOR", "ACTION"]


def test_what_is_changed_here_is_told_to_the_processes(invoke: Invoke, database_url: str) -> None:
    made = make(invoke)
    with psycopg.connect(database_url, autocommit=True) as conn:
        conn.execute("listen taskd_keys")

        invoke("keys", "revoke", made["id"])

        (note,) = conn.notifies(timeout=10, stop_after=1)
    assert note.payload == made["public_id"]
