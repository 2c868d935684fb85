from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest
from click.testing import CliRunner, Result

from taskd.cli import main
from taskd.model.jobtype import Retry, TypeInfo
from taskd.store import types
from tests.cli.conftest import WriteConfig

MAIL = TypeInfo(
    name="mail",
    handler="mail",
    plugin="p",
    description="Sends a mail.",
    schema={"type": "object", "properties": {"to": {"type": "string"}, "pin": {}}, "required": ["to"]},
    secrets=("pin",),
    retry=Retry(max_attempts=4),
)

Invoke = Callable[..., Result]


@pytest.fixture
def invoke(runner: CliRunner, config_file: Path) -> Invoke:
    """Run a command on the test's database."""

    def run(*words: str, stdin: str | bytes | None = None) -> Result:
        return runner.invoke(main, ["--config", str(config_file), *words], input=stdin)

    return run


@pytest.fixture
def published(database_url: str) -> None:
    async def publish() -> None:
        async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as conn:
            await types.publish(conn, [MAIL], node=None)

    asyncio.run(publish())


def test_migrate_brings_an_empty_database_up_and_again_does_nothing(
    runner: CliRunner, write_config: WriteConfig, empty_database_url: str
) -> None:
    file = str(write_config(f'database: {{url: "{empty_database_url}"}}\n'))
    assert runner.invoke(main, ["migrate", "status", "--config", file]).exit_code == 1
    assert "create table" in runner.invoke(main, ["migrate", "plan", "--config", file]).output

    first = runner.invoke(main, ["migrate", "--config", file])
    second = runner.invoke(main, ["migrate", "up", "--config", file])

    assert first.output.startswith("applied 0001_jobs\n")
    assert second.output == "nothing to do: the schema is that of this version\n"
    assert runner.invoke(main, ["migrate", "status", "--config", file]).exit_code == 0


def test_migrations_go_into_the_schema_of_the_file(
    runner: CliRunner, write_config: WriteConfig, empty_database_url: str
) -> None:
    file = write_config(f'database: {{url: "{empty_database_url}", schema: other}}\n')

    assert runner.invoke(main, ["migrate", "--config", str(file)]).exit_code == 0

    with psycopg.connect(empty_database_url) as conn:
        found = conn.execute(
            "select to_regclass('other.jobs') is not null, to_regclass('taskd.jobs') is null"
        )
        assert found.fetchone() == (True, True)


@pytest.mark.usefixtures("published")
def test_a_submitted_job_is_listed_and_shown(invoke: Invoke) -> None:
    job_id = invoke("submit", "mail", "-p", "to=a@example.org", "--tag", "t").stdout.strip()

    listed = json.loads(invoke("jobs", "list", "--json", "--tag", "t", "--since", "1h").output)
    shown = json.loads(invoke("jobs", "show", f"Message of id: {job_id}", "--json").output)

    assert [job["id"] for job in listed] == [job_id]
    assert shown["payload"] == {"to": "a@example.org"}
    assert (shown["status"], shown["max_attempts"], shown["tags"]) == ("pending", 4, ["t"])


@pytest.mark.parametrize(
    ("words", "stdin", "payload"),
    [
        pytest.param(["-p", "to=x", "-p", "n=3"], None, {"to": "x", "n": 3}, id="members"),
        pytest.param(["-p", "to=x", "-p", 'o={"a": [1]}'], None, {"to": "x", "o": {"a": [1]}}, id="objects"),
        pytest.param(["-p", "to=a=b"], None, {"to": "a=b"}, id="a value with an equals sign"),
        pytest.param(["-p", 'to="3"'], None, {"to": "3"}, id="a number as text"),
        pytest.param(["--json", '{"to": "x"}'], None, {"to": "x"}, id="literal"),
        pytest.param(["--json", "-"], '{"to": "y"}', {"to": "y"}, id="standard input"),
    ],
)
@pytest.mark.usefixtures("published")
def test_payload_is_given_by_members_or_as_json(
    invoke: Invoke, words: list[str], stdin: str | None, payload: object
) -> None:
    job_id = invoke("submit", "mail", *words, stdin=stdin).stdout.strip()

    assert json.loads(invoke("jobs", "show", job_id, "--json").output)["payload"] == payload


@pytest.mark.usefixtures("published")
def test_payload_comes_from_a_file(invoke: Invoke, tmp_path: Path) -> None:
    file = tmp_path / "payload.json"
    file.write_text('{"to": "z"}')

    assert invoke("submit", "mail", "--json", f"@{file}").exit_code == 0


@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        pytest.param(["-p", "n=1"], 1, "payload.to: is required", id="checked by the type's schema"),
        pytest.param(["--json", '{"to": "x"}, "priority": 1'], 1, "JSON", id="no way out of the payload"),
        pytest.param(["--json", "[]"], 1, "object", id="no object"),
        pytest.param(["-p", "to=x", "--priority", "101"], 1, "priority: ", id="out of range"),
        pytest.param(["-p", "to=x", "--json", "{}"], 2, "not by both", id="given twice"),
        pytest.param(["-p", "to"], 2, "NAME=VALUE", id="no value"),
        pytest.param(["--json", "@/nonexistent"], 2, "No such file", id="no such file"),
        pytest.param(["-p", "to=x", "--delay", "soon"], 2, "90s, 5m, 2h", id="no time span"),
    ],
)
@pytest.mark.usefixtures("published")
def test_submit_has_the_checks_of_the_door(invoke: Invoke, words: list[str], status: int, told: str) -> None:
    done = invoke("submit", "mail", *words)

    assert done.exit_code == status
    assert told in done.stderr


def test_submit_before_anything_was_published_is_to_be_tried_later(invoke: Invoke) -> None:
    assert invoke("submit", "mail", "-p", "to=x").exit_code == 75


@pytest.mark.usefixtures("published")
def test_submit_warns_when_no_worker_runs_the_type(invoke: Invoke) -> None:
    assert "no worker that lives" in invoke("submit", "mail", "-p", "to=x").stderr


@pytest.mark.usefixtures("published")
def test_a_second_submit_with_a_unique_key_is_the_first_job(invoke: Invoke) -> None:
    words = ("submit", "mail", "-p", "to=x", "--unique-key", "k")
    first, second = invoke(*words), invoke(*words)

    assert first.stdout == second.stdout
    assert "was submitted before" in second.stderr


@pytest.mark.usefixtures("published")
def test_a_wait_that_is_over_exits_with_75(invoke: Invoke) -> None:
    done = invoke("submit", "mail", "-p", "to=x", "--wait", "0.1")

    assert done.exit_code == 75
    assert "goes on: it is pending" in done.stderr


@pytest.mark.usefixtures("published")
def test_a_delayed_job_is_scheduled(invoke: Invoke) -> None:
    receipt = json.loads(invoke("--json", "submit", "mail", "-p", "to=x", "--delay", "5m").stdout)

    assert receipt["status"] == "scheduled"


@pytest.mark.usefixtures("published")
def test_secret_members_are_masked(invoke: Invoke) -> None:
    job_id = invoke("submit", "mail", "-p", "to=x", "-p", "pin=canary").stdout.strip()

    for words in (("jobs", "list", "--json"), ("jobs", "show", job_id), ("jobs", "show", job_id, "--json")):
        assert "canary" not in invoke(*words).output


@pytest.mark.usefixtures("published")
def test_text_of_others_cannot_disturb_a_terminal(invoke: Invoke) -> None:
    job_id = invoke(
        "submit", "mail", "--json", json.dumps({"to": "\x1b[2J"}), "--tag", "\u202ex"
    ).stdout.strip()

    assert "\x1b" not in invoke("jobs", "show", job_id).output


def test_a_job_that_is_not_there_exits_with_1(invoke: Invoke) -> None:
    done = invoke("jobs", "show", "01920000-0000-7000-8000-000000000000")

    assert done.exit_code == 1
    assert "there is no job" in done.stderr


@pytest.mark.usefixtures("published")
def test_published_types_are_listed_and_shown(invoke: Invoke) -> None:
    assert "Sends a mail." in invoke("types", "list").output
    shown = json.loads(invoke("types", "show", "mail", "--json").output)

    assert (shown["type"], shown["max_attempts"], shown["workers_online"]) == ("mail", 4, 0)
    assert invoke("types", "show", "nope").exit_code == 1


def test_nodes_are_listed(invoke: Invoke) -> None:
    assert invoke("nodes", "list").exit_code == 0
    assert json.loads(invoke("nodes", "list", "--json").output) == []


def test_a_key_is_shown_once(invoke: Invoke) -> None:
    made = json.loads(
        invoke("keys", "create", "mine", "--rate", "5", "--scope", "jobs:read", "--json").stdout
    )

    listed = invoke("keys", "list", "--json").stdout
    shown = json.loads(invoke("keys", "show", made["id"], "--json").stdout)

    assert made["key"].startswith("tk-")
    assert made["key"] not in listed
    assert [key["id"] for key in json.loads(listed)] == [made["id"]]
    assert (shown["rate_limit"]["rate"], shown["scopes"]) == (5.0, ["jobs:read"])


def test_create_prints_the_key_alone_for_scripts(invoke: Invoke) -> None:
    done = invoke("keys", "create", "mine")

    assert len(done.stdout.split()) == 1
    assert "never shown again" in done.stderr


def test_a_revoked_key_is_listed_as_such(invoke: Invoke) -> None:
    made = json.loads(invoke("keys", "create", "mine", "--json").stdout)

    assert invoke("keys", "revoke", made["id"]).exit_code == 0

    assert " revoked " in invoke("keys", "list").stdout


def test_a_key_with_wrong_members_is_refused(invoke: Invoke) -> None:
    done = invoke("keys", "create", "mine", "--prefix", "X", "--scope", "jobs:all")

    assert done.exit_code == 1
    assert "prefix: " in done.stderr
    assert "scopes[0]: " in done.stderr


def test_a_revoke_is_in_the_audit_with_who_did_it(invoke: Invoke, database_url: str) -> None:
    made = json.loads(invoke("keys", "create", "mine", "--json").stdout)
    invoke("keys", "revoke", made["id"])

    with psycopg.connect(database_url) as conn:
        rows = conn.execute("select action, actor from taskd.audit order by id").fetchall()

    assert [action for action, _ in rows] == ["key.create", "key.revoke"]
    assert all(actor.startswith("cli:") for _, actor in rows)
