"""The pages hold together: links resolve, code compiles, examples are valid."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

from taskd.child.load import handler_of
from taskd.cli.init import _TEXT
from taskd.config.read import parse
from taskd.errors import ConfigError, Problem
from taskd.plugin import JobType
from tests.docs import manual

ENV = {"ADMIN_TOKEN": "kq3Vn8xPz0Lr7TgW2mYb5CdF9hJs4Ae6"}

_LINK = re.compile(r"\]\(([^)\s]+)\)")
_TEST = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")

LINKS = [
    pytest.param(page, target, id=f"{page.relative_to(manual.ROOT)} to {target}")
    for page in manual.PAGES
    for target in dict.fromkeys(_LINK.findall(manual.prose(page)))
    if "://" not in target
]


@pytest.mark.parametrize(("page", "target"), LINKS)
def test_a_relative_link_leads_somewhere(page: Path, target: str) -> None:
    name, _, anchor = target.partition("#")
    to = (page.parent / name).resolve() if name else page

    assert to.exists()
    if anchor:
        assert anchor in manual.anchors(to)


@pytest.mark.parametrize(
    "page", [path for path in manual.PAGES if manual.DOCS in path.parents], ids=lambda path: path.name
)
def test_a_page_is_in_the_table_of_contents(page: Path) -> None:
    contents = manual.text("docs/README.md")
    name = str(page.relative_to(manual.DOCS))

    assert name == "README.md" or f"]({name})" in contents


def test_decisions_are_numbered_without_a_gap() -> None:
    names = sorted(path.name for path in (manual.DOCS / "decisions").iterdir())

    assert [name[:5] for name in names] == [f"{number:04}-" for number in range(1, len(names) + 1)]
    for name in names:
        assert manual.text(f"docs/decisions/{name}").startswith(f"# {name[:4]}: ")


@pytest.mark.parametrize(
    ("page", "code"),
    [
        pytest.param(page, code, id=f"{page} {number}")
        for page in ("README.md", "docs/plugins/write.md", "docs/use/submit.md")
        for number, code in enumerate(manual.blocks(page, "python"))
    ],
)
def test_a_python_example_compiles(page: str, code: str) -> None:
    compile(code, page, "exec")


def test_what_examples_import_from_taskd_exists() -> None:
    for code in manual.blocks("docs/plugins/write.md", "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("taskd"):
                module = importlib.import_module(node.module or "")
                assert all(hasattr(module, name.name) for name in node.names)


@pytest.mark.parametrize("code", manual.blocks("docs/plugins/write.md", "python"))
def test_a_plugin_example_can_be_loaded(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in (("greet", manual.blocks("docs/plugins/write.md", "python")[0]), ("example", code)):
        module = ModuleType(name)
        monkeypatch.setitem(sys.modules, name, module)
        exec(compile(text, name, "exec", dont_inherit=True), vars(module))

    for value in vars(sys.modules["example"]).values():
        if isinstance(value, JobType):
            assert handler_of(value).info.name == value.name


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(text, id=f"{page.relative_to(manual.ROOT)} {number}")
        for page in manual.PAGES
        for number, text in enumerate(manual.blocks(str(page.relative_to(manual.ROOT)), "yaml"))
    ],
)
def test_a_configuration_example_passes_the_reader(text: str) -> None:
    if not re.search(r"^admin:", text, re.MULTILINE):
        text = f"{text}\nadmin: {{token_env: ADMIN_TOKEN}}\n"

    # The files that hold secrets are not on this machine; all else must be right.
    assert [problem for problem in _problems(text) if not problem.path.endswith("_file")] == []


def _problems(text: str) -> Sequence[Problem]:
    try:
        parse(text, file="example", env=ENV)
    except ConfigError as error:
        return error.problems
    return ()


def test_the_configuration_that_the_tour_writes_passes_the_reader() -> None:
    tour = next(block for block in manual.blocks("README.md", "sh") if "job_types:" in block)
    added = tour.partition("<<'END'\n")[2].partition("\nEND\n")[0]

    config = parse(_TEXT.format(token=ENV["ADMIN_TOKEN"]) + added, file="taskd.yaml", env={}, mode=0o600)

    assert [entry.module for entry in config.tree.plugins] == ["greet"]
    assert "weekday" in config.tree.job_types


def test_the_plugin_of_the_tour_is_that_of_the_manual() -> None:
    tour = next(block for block in manual.blocks("README.md", "sh") if "greet.py" in block)

    written = tour.partition("<<'END'\n")[2].partition("END\n")[0]
    assert written == manual.blocks("docs/plugins/write.md", "python")[0]


@pytest.mark.parametrize(("file", "name"), _TEST.findall(manual.text("docs/guarantees.md")))
def test_a_promise_names_a_test_that_exists(file: str, name: str) -> None:
    code = (manual.ROOT / file).read_text(encoding="utf-8")

    assert re.search(rf"^(async )?def {name}\(", code, re.MULTILINE)


@pytest.mark.parametrize("name", ["taskd.service", "taskd-api.service", "taskd-worker@.service"])
def test_a_unit_stops_on_a_bad_configuration_and_starts_again_on_all_else(name: str) -> None:
    unit = manual.text(f"contrib/systemd/{name}")

    assert "\nRestart=always\n" in unit
    assert "\nRestartPreventExitStatus=78\n" in unit
    assert "\nType=notify\n" in unit
