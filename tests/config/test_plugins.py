"""`plugins:`: free-form options, their X_file and X_env, and problems that come back from the child."""

from __future__ import annotations

from pathlib import Path

import pytest

from taskd.config.plugins import plugin_problems
from taskd.errors import Problem
from tests.config.samples import ADMIN, only, problems, read_text

PLUGIN = f"{ADMIN}plugins:\n  - module: taskd_email\n    config:\n"


def test_options_are_read_by_the_rules_of_yaml_1_2() -> None:
    text = PLUGIN + (
        "      a: 1\n      b: -1.5e3\n      c: true\n      d: ~\n      e: [x, {f: 'no'}]\n"
        "      g: 2024-01-01\n"
        '      h: "0600"\n      i: |\n        two\n        lines\n'
    )

    assert read_text(text).tree.plugins[0].config == {
        "a": 1,
        "b": -1500.0,
        "c": True,
        "d": None,
        "e": ["x", {"f": "no"}],
        "g": "2024-01-01",
        "h": "0600",
        "i": "two\nlines\n",
    }


@pytest.mark.parametrize(
    ("value", "contains"),
    [
        pytest.param("no", "boolean", id="no"),
        pytest.param("0600", "octal", id="octal"),
        pytest.param("10:30", "sexagesimal", id="base 60"),
        pytest.param("8_080", "underscore", id="underscore"),
        pytest.param("0x10", "hexadecimal", id="hexadecimal"),
        pytest.param(".nan", "finite", id="not a number"),
        pytest.param("1e999", "finite", id="beyond a double"),
        pytest.param("1" * 301, "digits", id="too many digits"),
        pytest.param("${X}", "_env", id="interpolation"),
    ],
)
def test_traps_are_refused_in_options_too(value: str, contains: str) -> None:
    problem = only(f"{PLUGIN}      x:\n        - {value}\n")

    assert (problem.line, problem.path) == (7, "plugins[0].config.x[0]")
    assert contains in problem.message


def test_an_option_can_come_from_a_file_or_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("re_123\n")
    file.chmod(0o600)
    text = f"{PLUGIN}      api_key_file: {file}\n      from_env: FROM\n      base_env: UNSET\n"

    entry = read_text(text, env={"FROM": "a@b.example"}).tree.plugins[0]

    assert entry.config == {"api_key": "re_123", "from": "a@b.example"}
    assert entry.written == {"api_key": "api_key_file", "from": "from_env"}


@pytest.mark.parametrize(
    ("option", "contains"),
    [
        pytest.param("api_key_file: /nonexistent", "does not exist", id="missing file"),
        pytest.param("api_key_file: /dev/zero", "4 KiB", id="endless file"),
        pytest.param("api_key_file: 5", "string", id="no path"),
        pytest.param("api_key_env: $KEY", "variable", id="no variable"),
        pytest.param('api_key_file: ""', "empty", id="empty path"),
    ],
)
def test_the_file_of_an_option_has_the_rules_of_secret_files(option: str, contains: str) -> None:
    problem = only(f"{PLUGIN}      {option}\n")

    assert (problem.line, problem.path) == (6, f"plugins[0].config.{option.split(':')[0]}")
    assert contains in problem.message


def test_an_option_has_one_source() -> None:
    problem = only(f"{PLUGIN}      api_key: re_1\n      api_key_env: KEY\n", env={"KEY": "re_2"})

    assert (problem.line, problem.path) == (7, "plugins[0].config.api_key_env")
    assert "re_2" not in problem.message


def test_the_files_of_a_plugin_that_is_off_are_not_read() -> None:
    text = f"{ADMIN}plugins:\n  - module: a\n    enabled: false\n    config: {{x_file: /nonexistent}}\n"

    assert problems(text) == []


@pytest.mark.parametrize(
    ("entry", "path", "contains"),
    [
        pytest.param("{}", "plugins[0]", "exactly one of module and name", id="neither"),
        pytest.param("{module: a, name: b}", "plugins[0].name", "exactly one", id="both"),
        pytest.param("{module: ./a.py}", "plugins[0].module", "dotted name", id="path"),
        pytest.param("{module: a, enable: true}", "plugins[0].enable", "did you mean enabled?", id="typo"),
        pytest.param("{module: a, config: x}", "plugins[0].config", "mapping", id="config"),
        pytest.param("{module: a, enabled: 1}", "plugins[0].enabled", "true or false", id="enabled"),
    ],
)
def test_an_entry_names_one_plugin(entry: str, path: str, contains: str) -> None:
    problem = only(f"{ADMIN}plugins:\n  - {entry}\n")

    assert (problem.line, problem.path) == (4, path)
    assert contains in problem.message


def test_a_plugin_is_listed_once() -> None:
    assert only(f"{ADMIN}plugins:\n  - module: a\n  - module: a\n").path == "plugins[1].module"


def test_problems_of_plugins_get_the_lines_of_the_file() -> None:
    config = read_text(
        f"{PLUGIN}      api_key_env: KEY\n      api_key_fiel: /x\n  - name: other\n", env={"KEY": "re_1"}
    )

    found = plugin_problems(
        config,
        [
            (0, "module", "raised RuntimeError"),
            (0, "config", "api_key is missing"),
            (0, "config.api_key", "too short"),
            (0, "config.api_key.x[0]", "deep"),
            (0, "config.api_key_fiel", "unknown; did you mean api_key_file?"),
            (1, "module", "not a taskd plugin"),
            (1, "config", "x is missing"),
            (1, "", "broken"),
            (7, "module", "discovered, not in the file"),
        ],
    )

    assert found == [
        Problem(4, "plugins[0].module", "raised RuntimeError"),
        Problem(5, "plugins[0].config", "api_key is missing"),
        Problem(6, "plugins[0].config.api_key_env", "too short"),
        Problem(6, "plugins[0].config.api_key_env.x[0]", "deep"),
        Problem(7, "plugins[0].config.api_key_fiel", "unknown; did you mean api_key_file?"),
        Problem(8, "plugins[1].name", "not a taskd plugin"),
        Problem(8, "plugins[1].config", "x is missing"),
        Problem(8, "plugins[1]", "broken"),
        Problem(0, "plugins", "discovered, not in the file"),
    ]
