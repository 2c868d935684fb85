from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from taskd.cli import main
from tests.cli.conftest import TOKEN, WriteConfig, taskd

CASES = json.loads((Path(__file__).parents[1] / "data" / "cases" / "bad_config.json").read_text())["cases"]


def text_of(part: Any) -> str:
    """The text of a case: literal, or made of parts."""
    if isinstance(part, str):
        return part
    if "gen" in part:
        return "".join(map(text_of, part["gen"]))
    return str(text_of(part["repeat"])) * int(part["count"])


def told_lines(stderr: str, file: Path) -> Iterator[tuple[int, str]]:
    for line in stderr.splitlines():
        if match := re.match(re.escape(str(file)) + r":(\d+): (.*)", line):
            yield int(match[1]), match[2]


@pytest.mark.parametrize(("case"), [pytest.param(case, id=case["id"]) for case in CASES])
def test_check_config_tells_every_mistake(
    case: dict[str, Any], tmp_path: Path, write_config: WriteConfig
) -> None:
    credential = tmp_path / "resend"
    credential.write_text("re_canary0123456789")
    credential.chmod(0o600)
    file = write_config(text_of(case["yaml"]).replace("/run/credentials/taskd/resend", str(credential)))
    expect = case["expect"]

    done = taskd("check-config", file, env=case.get("env"))

    assert done.returncode == expect["exit"], done.stderr
    lines = list(told_lines(done.stderr, file))
    for error in expect.get("errors", []):
        path = f"{error['path']}: " if error["path"] else ""
        wanted = error["contains"].lower()
        assert any(
            line == error["line"] and text.startswith(path) and wanted in text.lower() for line, text in lines
        ), done.stderr
    if expect["exit"]:
        assert lines == sorted(lines, key=lambda told: told[0])
    assert "Traceback" not in done.stderr
    for secret in (*expect.get("must_not_contain", []), "re_canary0123456789"):
        assert secret not in done.stderr + done.stdout


@pytest.mark.parametrize(("command"), [pytest.param(name, id=name) for name in ("check-config", "api", "up")])
def test_a_file_with_a_token_that_the_world_reads_is_refused(write_config: WriteConfig, command: str) -> None:
    file = write_config(f"admin: {{token: {TOKEN}}}\n")
    file.chmod(0o644)

    done = taskd(command, "--config", file)

    assert done.returncode == 78
    assert "mode is 0644" in done.stderr
    assert TOKEN not in done.stderr


@pytest.mark.parametrize(("command"), [pytest.param(name, id=name) for name in ("api", "worker", "up")])
def test_daemons_refuse_a_bad_file_before_they_connect(write_config: WriteConfig, command: str) -> None:
    file = write_config("database: {url: postgresql://127.0.0.1:1/none}\nworkers: {lease: 1s}\n")

    done = taskd(command, "--config", file)

    assert done.returncode == 78
    assert f"{file}:2: workers.lease: " in done.stderr


def test_a_plugin_that_cannot_be_imported_stops_a_worker(write_config: WriteConfig) -> None:
    file = write_config(
        "database: {url: 'postgresql://127.0.0.1:1/none'}\nplugins:\n  - module: fixtures.raises_on_import\n"
    )

    done = taskd("worker", "--config", file)

    assert done.returncode == 78
    assert f"{file}:3: plugins[0].module: its import raised RuntimeError" in done.stderr


def test_check_config_accepts_the_shipped_file() -> None:
    file = Path(__file__).parents[2] / "conf" / "taskd.yaml"

    done = taskd(
        "check-config", file, "--json", env={"ADMIN_TOKEN": TOKEN, "RESEND_API_KEY": "re_0123456789"}
    )

    assert done.returncode == 0, done.stderr
    assert {"echo", "sleep", "send_email"} <= set(json.loads(done.stdout)["types"])


def test_an_installed_plugin_without_its_options_is_left_out_with_a_warning(
    write_config: WriteConfig,
) -> None:
    done = taskd("check-config", write_config(f"admin: {{token: {TOKEN}}}\n"))

    assert done.returncode == 0
    assert "plugin email is installed, and its job types are absent: api_key is missing" in done.stderr


def test_config_example_is_the_shipped_file(runner: CliRunner) -> None:
    shipped = (Path(__file__).parents[2] / "conf" / "taskd.yaml").read_text()

    assert runner.invoke(main, ["config", "example"]).output == shipped


def test_config_show_masks_secrets_and_says_where_values_come_from(
    runner: CliRunner, write_config: WriteConfig
) -> None:
    file = write_config(
        f"admin: {{token: {TOKEN}}}\nworkers:\n  lease: 40s\n"
        "plugins:\n  - module: taskd_email\n    config: {api_key: re_canary0123456789}\n"
    )

    told = runner.invoke(main, ["config", "show", "--sources", "--config", str(file)]).output

    assert re.search(rf"^workers\.lease +40s +{file}:3$", told, re.MULTILINE)
    assert re.search(r"^workers\.heartbeat +3s +default$", told, re.MULTILINE)
    assert re.search(r"^admin\.token +\*\*\* ", told, re.MULTILINE)
    assert TOKEN not in told
    assert "re_canary" not in told


def test_init_writes_a_private_file_that_is_accepted(tmp_path: Path) -> None:
    file = tmp_path / "new" / "taskd.yaml"

    assert taskd("init", file).returncode == 0

    assert stat.S_IMODE(os.stat(file).st_mode) == 0o600
    assert taskd("check-config", file).returncode == 0


def test_init_leaves_a_file_that_exists_as_it_is(runner: CliRunner, tmp_path: Path) -> None:
    file = tmp_path / "taskd.yaml"
    file.write_text("precious")

    told = runner.invoke(main, ["init", str(file)])

    assert told.exit_code == 1
    assert file.read_text() == "precious"
