"""`conf/taskd.yaml` and the manual's table: made from the tree, complete, and valid."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from taskd.config.example import example, rows, table
from taskd.config.read import parse, read
from taskd.config.secret import Secret
from tests.config.samples import ADMIN, TOKEN, problems, read_text

SHIPPED = Path(__file__).parent.parent.parent / "conf" / "taskd.yaml"
ENV = {"DATABASE_URL": "postgresql://h/d", "ADMIN_TOKEN": TOKEN, "RESEND_API_KEY": "re_123"}
NEEDS_FILES = {"url_file", "pepper_file"}


def test_the_shipped_file_is_the_generated_one() -> None:
    assert SHIPPED.read_text() == example()


def test_the_shipped_file_is_valid_with_the_environment_names_of_old() -> None:
    tree = read(SHIPPED, env=ENV).tree

    assert tree.database.url == Secret("postgresql://h/d")
    assert tree.admin.tokens == (Secret(TOKEN),)
    assert (tree.plugins[0].module, tree.plugins[0].config) == ("taskd_email", {"api_key": "re_123"})


def test_the_shipped_file_says_the_defaults() -> None:
    shipped, bare = read(SHIPPED, env=ENV).tree, read_text(ADMIN).tree

    for section in (
        "api",
        "rate_limit",
        "workers",
        "retry",
        "retention",
        "limits",
        "log",
        "metrics",
        "pools",
    ):
        assert getattr(shipped, section) == getattr(bare, section)


def test_the_shipped_file_shows_every_key_with_one_comment_line() -> None:
    lines = [line.replace("#", " ").strip() for line in example().splitlines()]

    for row in rows():
        key = row.path.rpartition(".")[2]
        places = [number for number, line in enumerate(lines) if re.match(rf"(- )?{key}:", line)]
        assert places, row.path
        assert row.text, row.path
        assert "\n" not in row.text
        assert any(row.text.replace("#", " ").strip() == lines[place - 1] for place in places), row.path


def test_the_shipped_file_switches_nothing_on_that_is_off_by_default() -> None:
    assert read(SHIPPED, env=ENV).tree.webhooks is None
    assert all("do nothing yet" not in warning for warning in read(SHIPPED, env=ENV).warnings)


@pytest.mark.parametrize("section", ["pools", "schedules", "webhooks", "metrics"])
def test_a_section_is_valid_once_its_marks_are_taken_away(section: str) -> None:
    block = next(part for part in example().split("\n\n") if f"\n#{section}:" in part)
    text = "\n".join(line.removeprefix("#") for line in block.splitlines()[1:]) + "\n"

    assert problems(ADMIN + text) == []


def test_every_key_that_is_absent_by_default_has_a_valid_example() -> None:
    section = ""
    for line in example().splitlines():
        if match := re.match(r"([a-z_]+):", line):
            section = match[1]
        match = re.fullmatch(r"  #([a-z_]+): (.*)", line)
        if match is None or section == "admin" or match[1] in NEEDS_FILES:
            continue
        assert problems(f"{ADMIN}{section}:\n  {match[1]}: {match[2]}\n", env=ENV) == [], line


def test_every_key_of_a_job_type_has_a_valid_example() -> None:
    block = next(part for part in example().split("\n\n") if "\n#job_types:" in part)
    keys = [line[5:] for line in block.splitlines() if re.match(r"#    [a-z_]+: ", line)]

    assert len(keys) > 20
    for key in keys:
        beside = (
            "" if not key.startswith(("params", "success", "no_retry", "env", "cwd")) else "command: [/x]"
        )
        beside = "params: {file: x}" if key.startswith("command") else beside
        found = problems(f"{ADMIN}job_types:\n  a:\n    {beside}\n    {key}\n")
        assert found == [] or key.startswith("http:"), found


def test_the_example_token_is_refused() -> None:
    match = re.search(r"#token: (.*)", example())
    assert match is not None

    assert "placeholder" in problems(f"admin:\n  token: {match[1]}\n")[0].message


def test_no_line_of_the_shipped_file_is_long() -> None:
    assert max(map(len, example().splitlines())) <= 110


def test_the_table_has_a_row_for_each_key() -> None:
    lines = table().splitlines()

    assert len(lines) == len(rows()) + 2
    assert all(line.count(" | ") == 4 for line in lines if not line.startswith("|---"))
    assert "| `api.port` | `8080` | 1 to 65535 | restart | The TCP port to listen on. |" in lines


def test_the_shipped_file_has_unix_lines_and_ascii_only() -> None:
    raw = SHIPPED.read_bytes()

    assert raw.isascii()
    assert b"\r" not in raw
    assert parse(raw, file="x", env=ENV).warnings
