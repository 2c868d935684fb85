"""`--describe` and `--check` of a real child process, and what a plugin that can't be loaded says."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from taskd.model.jobtype import TypeInfo
from taskd.wire import Broken, Describe, Described, Plugin
from tests.child import plugins_for_tests as sources
from tests.child.driver import ROOT, Child, child_env

KEY = "re_live_secret_key"


@pytest.fixture
def describe(tmp_path: Path) -> Callable[..., Described]:
    """Describe plugins given as source texts, or as `Plugin`s that are installed."""

    def ask(
        *plugins: str | Plugin, options: dict[str, Any] | None = None, mode: str = "--describe"
    ) -> Described:
        asked = []
        for number, plugin in enumerate(plugins):
            if isinstance(plugin, str):
                (tmp_path / f"plugin_{number}.py").write_text(plugin)
                plugin = Plugin(module=f"plugin_{number}", options=options or {})
            asked.append(plugin)
        done = subprocess.run(
            [sys.executable, "-m", "taskd.child", mode],
            input=msgspec.json.encode(Describe(plugins=asked)),
            capture_output=True,
            env={**child_env(), "PYTHONPATH": f"{ROOT}:{tmp_path}"},
            timeout=60,
            check=True,
        )
        return msgspec.json.decode(done.stdout, type=Described)

    return ask


def problems(described: Described) -> list[tuple[str, str, bool]]:
    return [(problem.path, problem.message, problem.missing) for problem in described.problems]


def test_a_type_is_described_from_its_signature(describe: Callable[..., Described]) -> None:
    described = describe(sources.GREET)

    assert described.problems == []
    assert described.types == [
        TypeInfo(
            name="greet",
            handler="greet",
            plugin="plugin_0",
            description="Say hello.\n\nAs often as you like.",
            schema={
                "type": "object",
                "properties": {"name": {"type": "string"}, "times": {"type": "integer", "default": 1}},
                "required": ["name"],
                "additionalProperties": False,
            },
            example={"name": "Ada", "times": 2},
            timeout=10.0,
            rate=1.5,
        )
    ]


@pytest.mark.parametrize(
    ("source", "path", "message"),
    [
        pytest.param(sources.RAISES_ON_IMPORT, "module", "RuntimeError: no luck today", id="import raises"),
        pytest.param(sources.EXITS_ON_IMPORT, "module", "SystemExit: 3", id="import exits"),
        pytest.param(sources.NO_HOOK, "module", "is not a taskd plugin", id="no hook"),
        pytest.param(sources.MISSPELT, "module", "did you mean taskd_job_types?", id="a misspelt hook"),
        pytest.param(sources.WRONG_ARGUMENT, "module", "taskd_job_types", id="an argument that no hook has"),
        pytest.param(sources.NO_LIST, "module", "must return a list of job types", id="no list"),
        pytest.param(sources.NO_DECORATOR, "module", "decorate it with @job", id="a plain function"),
        pytest.param(
            sources.UNTYPED, "module", "parameter name has no type", id="a parameter without a type"
        ),
        pytest.param(sources.BAD_EXAMPLE, "module", "its example does not fit", id="an example that is none"),
        pytest.param(sources.RESERVED, "module", "reserved", id="a name of ours"),
        pytest.param(sources.BAD_TIMEOUT, "module", "job type greet: '10' is not a duration", id="no unit"),
    ],
)
def test_a_plugin_that_is_wrong_is_named_with_the_reason_and_harms_no_other(
    describe: Callable[..., Described], source: str, path: str, message: str
) -> None:
    described = describe(source, sources.GREET)

    [problem] = described.problems
    assert (problem.plugin, problem.path, problem.missing) == (0, path, False)
    assert message in problem.message
    assert [known.name for known in described.types] == ["greet"]


def test_modules_and_names_that_are_not_there_are_named(describe: Callable[..., Described]) -> None:
    described = describe(
        Plugin(module="no_such_module"), Plugin(module="json"), Plugin(name="no-such-plugin")
    )

    assert [problem.path for problem in described.problems] == ["module", "module", "name"]
    assert "no module 'no_such_module'" in described.problems[0].message
    assert "is not a taskd plugin" in described.problems[1].message
    assert "no plugin of this name is installed" in described.problems[2].message


def test_a_module_that_needs_another_that_is_absent_names_the_exception(
    describe: Callable[..., Described],
) -> None:
    [problem] = describe("import absent_library").problems

    assert "ModuleNotFoundError: No module named 'absent_library'" in problem.message


def test_a_type_that_two_plugins_declare_is_refused_to_the_second(describe: Callable[..., Described]) -> None:
    described = describe(sources.GREET, sources.GREET)

    [problem] = described.problems
    assert (problem.plugin, problem.message) == (1, "job type greet is declared by plugin plugin_0 already")
    assert len(described.types) == 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        pytest.param(
            {},
            [("config", "api_key is missing; set api_key or api_key_file or api_key_env", True)],
            id="a required option is missing",
        ),
        pytest.param(
            {"api_key_fiel": "/x"},
            [
                ("config", "api_key is missing; set api_key or api_key_file or api_key_env", True),
                ("config.api_key_fiel", "is no option of this plugin; did you mean api_key_file?", False),
            ],
            id="misspelt, all forms of the name are suggested",
        ),
        pytest.param(
            {"api_key": KEY, "xyz": 1},
            [("config.xyz", "is no option of this plugin", False)],
            id="nothing near",
        ),
        pytest.param(
            {"api_key": KEY, "retries": KEY},
            [("config.retries", 'the value is not of type "integer"', False)],
            id="the value is not shown",
        ),
    ],
)
def test_options_are_checked_against_what_the_plugin_declares(
    describe: Callable[..., Described], options: dict[str, Any], expected: list[tuple[str, str, bool]]
) -> None:
    assert sorted(problems(describe(sources.WITH_OPTIONS, options=options))) == sorted(expected)


@pytest.mark.parametrize(
    ("sender", "message"),
    [
        pytest.param("bad", "*** may not send as that", id="ValueError is the author's own refusal"),
        pytest.param("worse", "taskd_job_types raised RuntimeError: broken with ***", id="anything else"),
    ],
)
def test_what_a_hook_raises_is_shown_without_the_values_of_options(
    describe: Callable[..., Described], sender: str, message: str
) -> None:
    described = describe(sources.WITH_OPTIONS, options={"api_key": KEY, "sender": sender})

    assert problems(described) == [("config", message, False)]


def test_check_asks_the_plugins_what_would_keep_them_from_working(describe: Callable[..., Described]) -> None:
    described = describe(sources.WITH_OPTIONS, options={"api_key": KEY, "sender": "me"}, mode="--check")

    assert problems(described) == [("", "me is not verified with ***", False)]


def test_a_child_that_can_not_load_says_why_and_exits(tmp_path: Path) -> None:
    with Child("no_such_module", ["greet"]) as child:
        answer = child.ready()
        child.read_to_end()

        assert isinstance(answer, Broken)
        assert "no module 'no_such_module'" in answer.problem
        assert child.process.wait(30) == 1


def test_a_child_whose_plugin_can_not_start_says_why_without_secrets() -> None:
    with Child("tests.child.refusing", ["greet"], options={"api_key": KEY}) as child:
        answer = child.ready()

        assert answer == Broken("taskd_child_started raised ConnectionError: refused ***")


def test_a_plain_def_is_refused_in_a_child_of_many_jobs() -> None:
    with Child("tests.child.hostile", ["sync_noop"]) as child:
        assert "isolation: process" in child.ready().problem


def test_a_handler_that_no_plugin_has_is_named() -> None:
    with Child("tests.child.hostile", ["lane=nobody"]) as child:
        assert child.ready() == Broken("job type lane: no plugin here has handler nobody")


@pytest.fixture
def hooked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make the plugin `hooked_plugin` importable for children; return the file it writes at its end."""
    out = tmp_path / "out"
    (tmp_path / "hooked_plugin.py").write_text(f"OUT = {str(out)!r}\n{sources.HOOKS}")
    environment = {**child_env(), "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    monkeypatch.setattr("tests.child.driver.child_env", lambda: environment)
    return out


def test_hooks_go_around_each_job(hooked: Path) -> None:
    with Child("hooked_plugin", ["hooked"]) as child:
        run = child.start("hooked", {"how": "well"})
        assert child.finished(run).outcome == "completed"
        failed = child.start("hooked", {"how": "fail"})
        assert child.finished(failed).outcome == "fail"
        assert child.stop() == 0

        assert child.lines(run)[:4] == [
            "before",
            "running with resources",
            "after",
            "finished completed None",
        ]
        assert child.lines(failed)[2:5] == ["saw Fail", "after", "finished fail no"]
    assert hooked.read_text() == "stopping"


def test_hooks_go_around_jobs_of_a_plain_def_too(hooked: Path) -> None:
    with Child("hooked_plugin", ["hooked_sync"], isolation="process") as child:
        run = child.start("hooked_sync")
        child.finished(run)
        assert child.stop() == 0

        assert child.lines(run)[:4] == ["before", "running", "after", "finished completed None"]
    assert hooked.read_text() == "stopping"


def test_a_wrapper_that_raises_fails_the_attempt(hooked: Path) -> None:
    with Child("hooked_plugin", ["hooked"]) as child:
        assert child.run("hooked", {"how": "well"}, attempt=9).error == "RuntimeError: not today"


def test_a_child_loads_nothing_that_few_plugins_need() -> None:
    code = (
        "import sys, taskd.child.__main__, taskd.builtin.echo\n"
        "rare = {'jsonschema_rs', 'importlib.metadata', 'email', 'zipfile', 'difflib', 'argparse'}\n"
        "print(sorted(rare & set(sys.modules)))"
    )

    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
