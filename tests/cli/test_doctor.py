from __future__ import annotations

import dataclasses
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner

from taskd.cli import main
from taskd.cli.doctor import judge
from taskd.store.nodes import ServerFacts
from tests.cli.conftest import WriteConfig

NOW = datetime(2026, 1, 31, 9, tzinfo=UTC)
GOOD = ServerFacts(
    version=150018,
    version_text="15.18",
    fsync="on",
    full_page_writes="on",
    synchronous_commit="on",
    read_only="off",
    in_recovery=False,
    clock=NOW,
    numbers_left=1_000_000_000,
    persistence="p",
)


def test_a_good_server_passes_every_check() -> None:
    assert all(check.ok for check in judge(GOOD, NOW, NOW))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        pytest.param({"version": 130000}, "server version", id="too old"),
        pytest.param({"fsync": "off"}, "fsync", id="fsync"),
        pytest.param({"full_page_writes": "off"}, "full_page_writes", id="torn pages"),
        pytest.param({"synchronous_commit": "off"}, "synchronous_commit", id="commits that may vanish"),
        pytest.param({"persistence": "u"}, "tables", id="unlogged"),
        pytest.param({"in_recovery": True}, "primary", id="standby"),
        pytest.param({"read_only": "on"}, "writable", id="read-only"),
        pytest.param({"clock": NOW + timedelta(seconds=3)}, "clock", id="its clock is ahead"),
        pytest.param({"clock": NOW - timedelta(seconds=3)}, "clock", id="its clock is behind"),
    ],
)
def test_what_breaks_promises_fails_and_says_what_to_do(change: dict[str, object], name: str) -> None:
    failed = [check for check in judge(dataclasses.replace(GOOD, **change), NOW, NOW) if not check.ok]  # type: ignore[arg-type]

    assert [check.name for check in failed] == [name]
    assert failed[0].fix


def test_a_slow_answer_is_no_skew() -> None:
    facts = dataclasses.replace(GOOD, clock=NOW + timedelta(seconds=5))

    assert all(check.ok for check in judge(facts, NOW, NOW + timedelta(seconds=10)))


def test_doctor_says_that_the_schema_is_missing(
    runner: CliRunner, write_config: WriteConfig, empty_database_url: str
) -> None:
    file = write_config(f'database: {{url: "{empty_database_url}"}}\n')

    told = runner.invoke(main, ["doctor", "--json", "--config", str(file)])

    checks = {check["name"]: check for check in json.loads(told.stdout)["checks"]}
    assert told.exit_code == 1
    assert checks["schema"]["ok"] is False
    assert checks["schema"]["fix"] == "taskd migrate"


def test_doctor_finds_the_settings_of_the_server(runner: CliRunner, config_file: Path) -> None:
    told = runner.invoke(main, ["doctor", "--json", "--config", str(config_file)])

    checks = {check["name"]: check["ok"] for check in json.loads(told.stdout)["checks"]}
    # The server of the tests is a fast one, that forgets.
    assert (checks["schema"], checks["clock"], checks["fsync"]) == (True, True, False)
    assert told.exit_code == 1


def test_doctor_tells_an_unreachable_database(runner: CliRunner, write_config: WriteConfig) -> None:
    file = write_config("database: {url: 'postgresql://127.0.0.1:1/none'}\n")

    told = runner.invoke(main, ["doctor", "--config", str(file)])

    assert told.exit_code == 69
    assert "FAILED  database" in told.stdout
