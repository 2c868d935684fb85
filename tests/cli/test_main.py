from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from taskd import __version__
from taskd.cli import exit_status, main, said
from taskd.errors import (
    ConfigError,
    FieldProblem,
    Problem,
    Refused,
    SchemaMismatch,
    StoreUnavailable,
    TaskdError,
    UnsafeDatabase,
)
from taskd.process.runtime import NodeTaken
from tests.cli.conftest import TOKEN, WriteConfig

COMMANDS = list(main.list_commands(None))  # type: ignore[arg-type]


def test_version_is_that_of_the_package(runner: CliRunner) -> None:
    assert runner.invoke(main, ["--version"]).output == f"taskd {__version__}\n"


def test_help_names_every_command(runner: CliRunner) -> None:
    told = runner.invoke(main, ["--help"]).output

    assert all(f"\n  {name} " in told for name in COMMANDS)


@pytest.mark.parametrize(("command"), [pytest.param(name, id=name) for name in COMMANDS])
def test_every_command_takes_a_configuration(runner: CliRunner, command: str) -> None:
    told = runner.invoke(main, [command, "--help"])

    assert told.exit_code == 0
    assert "--config FILE" in told.output


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\nfrom click.testing import CliRunner\nfrom taskd.cli import main\n"
        "assert CliRunner().invoke(main, ['--help']).exit_code == 0\n"
        "heavy = {'sanic', 'psycopg', 'yaml', 'uvloop', 'msgspec', 'taskd.engine', 'taskd.store'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )

    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_listing_jobs_loads_neither_web_framework_nor_engine(config_file: Path) -> None:
    words = ["--config", str(config_file), "jobs", "list"]
    code = (
        "import sys\nfrom click.testing import CliRunner\nfrom taskd.cli import main\n"
        f"assert CliRunner().invoke(main, {words!r}).exit_code == 0\n"
        "print(sorted({'sanic', 'taskd.engine.daemon', 'taskd.api.app'} & set(sys.modules)))"
    )

    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        pytest.param(TaskdError("x"), 1, id="failed"),
        pytest.param(NodeTaken("x"), 1, id="a second worker of this name"),
        pytest.param(Refused("not_found", "x"), 1, id="refused"),
        pytest.param(StoreUnavailable("x"), 69, id="database unreachable"),
        pytest.param(SchemaMismatch("x"), 69, id="not migrated"),
        pytest.param(Refused("not_ready", "x"), 75, id="nothing was published yet"),
        pytest.param(Refused("backlog_full", "x"), 75, id="too much waits"),
        pytest.param(ConfigError("f", [Problem(1, "", "x")]), 78, id="bad file"),
        pytest.param(UnsafeDatabase("x"), 78, id="a database that loses jobs"),
    ],
)
def test_exit_status_of_errors(error: TaskdError, status: int) -> None:
    assert exit_status(error) == status


def test_problems_of_a_file_are_told_by_line() -> None:
    error = ConfigError("f.yaml", [Problem(12, "b", "two"), Problem(3, "a", "one"), Problem(0, "", "none")])

    assert said(error) == "f.yaml:0: none\nf.yaml:3: a: one\nf.yaml:12: b: two"


def test_every_wrong_field_is_told() -> None:
    error = Refused("invalid_field", "x", fields=[FieldProblem("a", "is one"), FieldProblem("b", "is two")])

    assert said(error) == "taskd: a: is one\ntaskd: b: is two"


def test_wrong_usage_exits_with_2(runner: CliRunner) -> None:
    assert runner.invoke(main, ["jobs", "list", "--limit", "no"]).exit_code == 2
    assert runner.invoke(main, ["jbos"]).exit_code == 2


@pytest.mark.parametrize(
    ("words"),
    [
        pytest.param(["--config", "{file}", "config", "show"], id="before the command"),
        pytest.param(["config", "--config", "{file}", "show"], id="within"),
        pytest.param(["config", "show", "--config", "{file}"], id="behind it"),
    ],
)
def test_config_option_wins_over_the_variable(
    runner: CliRunner, write_config: WriteConfig, words: list[str]
) -> None:
    file = write_config(f"admin: {{token: {TOKEN}}}\n")
    filled = [word.format(file=file) for word in words]

    assert runner.invoke(main, filled, env={"TASKD_CONFIG": "/nonexistent"}).exit_code == 0


def test_variable_names_the_configuration(runner: CliRunner, write_config: WriteConfig) -> None:
    file = write_config(f"admin: {{token: {TOKEN}}}\n")

    assert runner.invoke(main, ["config", "show"], env={"TASKD_CONFIG": str(file)}).exit_code == 0


def test_without_a_database_commands_say_what_is_missing(
    runner: CliRunner, write_config: WriteConfig
) -> None:
    file = write_config("database: {url_env: NOT_SET_AT_ALL}\n")

    told = runner.invoke(
        main, ["jobs", "list", "--config", str(file)], env={"STATE_DIRECTORY": "/nonexistent"}
    )

    assert told.exit_code == 78
    assert told.stderr.startswith(f"{file}:1: database: no database URL is in force")
    assert "NOT_SET_AT_ALL is not set" in told.stderr


def test_unreachable_database_exits_with_69(runner: CliRunner, write_config: WriteConfig) -> None:
    file = write_config("database: {url: 'postgresql://nobody:S3cretPw@127.0.0.1:1/none'}\n")

    told = runner.invoke(main, ["nodes", "list", "--config", str(file)])

    assert told.exit_code == 69
    assert "S3cretPw" not in told.output
