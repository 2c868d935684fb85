"""Every case of bad_config.json, on the reader alone.

The cases of plugins need a child process that imports them: tests/cli runs those through
`taskd check-config`. They are named here so that a new one can't be passed over.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from taskd.config.read import read
from taskd.errors import ConfigError, Problem

CASES = json.loads((Path(__file__).parent.parent / "data" / "cases" / "bad_config.json").read_text())["cases"]
NEED_A_CHILD = {"x-plugin-raises", "x-plugin-notplugin", "x-plugin-config"}
HERE = [case for case in CASES if case["id"] not in NEED_A_CHILD]


def text_of(yaml: Any) -> str:
    if isinstance(yaml, str):
        return yaml
    return "".join(part if isinstance(part, str) else part["repeat"] * part["count"] for part in yaml["gen"])


@pytest.mark.parametrize("case", HERE, ids=[case["id"] for case in HERE])
def test_a_case_gives_its_errors(case: dict[str, Any], tmp_path: Path) -> None:
    credential = tmp_path / "resend"
    credential.write_text("re_123456789\n")
    credential.chmod(0o600)
    file = tmp_path / "taskd.yaml"
    text = text_of(case["yaml"]).replace("/run/credentials/taskd/resend", str(credential))
    file.write_text(text, newline="")
    file.chmod(0o600)
    expected = case["expect"]

    found: list[Problem] = []
    try:
        read(file, env={})
    except ConfigError as error:
        found = list(error.problems)

    assert bool(found) == bool(expected["exit"])
    for wanted in expected["errors"]:
        assert any(_is(problem, wanted) for problem in found), found
    if "exact_count" in expected:
        assert len(found) == expected["exact_count"]
    assert found == sorted(found)
    shown = "\n".join(problem.show(str(file)) for problem in found)
    for secret in expected.get("must_not_contain", []):
        assert secret not in shown
    if "side_effect" in expected:
        assert not Path("/tmp/taskd-pwned").exists()


def test_the_cases_left_to_the_command_line_exist() -> None:
    assert {case["id"] for case in CASES} >= NEED_A_CHILD


def _is(problem: Problem, wanted: dict[str, Any]) -> bool:
    return (
        problem.line == wanted["line"]
        and wanted["path"] in (None, problem.path)
        and wanted["contains"].lower() in problem.message.lower()
    )
