from __future__ import annotations

import os
from collections.abc import Mapping

import pytest

from taskd.cli import plugins
from taskd.cli.plugins import Installed, Source, sources
from taskd.config.read import Config, parse
from taskd.errors import ConfigError
from taskd.process.environment import child_env
from taskd.registry import Answer, Registry
from taskd.wire import Plugin, PluginProblem
from tests.cli.conftest import FIXTURES, clean_env

EMAIL = Installed("email", "taskd_email")


def config_of(text: str) -> Config:
    return parse(text, file="t.yaml", env={}, need_admin=False)


def loaded(text: str, **more: str) -> Registry:
    return plugins.load(config_of(text), {**os.environ, **clean_env(**more)})[0]


def refused(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        loaded(text)
    return str(caught.value)


def names_of(text: str, *points: Installed) -> list[str | None]:
    found = sources(config_of(text).tree, points)
    return [source.plugin.module or source.plugin.name for source in found]


def test_shipped_plugins_come_first_then_those_of_the_file_then_the_installed_ones() -> None:
    text = "plugins:\n  - module: b_plugin\n  - name: a_plugin\n"

    named = names_of(text, Installed("a_plugin", "a_module"), EMAIL)

    assert named == ["taskd.builtin.echo", "b_plugin", "a_plugin", "email"]


@pytest.mark.parametrize(
    ("entry"),
    [
        pytest.param("name: email", id="by its name"),
        pytest.param("module: taskd_email", id="by its module"),
    ],
)
def test_an_installed_plugin_is_not_loaded_beside_its_entry(entry: str) -> None:
    assert len(names_of(f"plugins:\n  - {entry}\n", EMAIL)) == 2
    assert names_of(f"plugins:\n  - {entry}\n    enabled: false\n", EMAIL) == ["taskd.builtin.echo"]


def test_only_the_children_of_a_pool_get_the_commands_of_it() -> None:
    text = (
        "pools: {other: {processes: 1}}\n"
        "job_types:\n"
        "  a: {command: [/bin/a], env: {TOKEN: a-secret}}\n"
        "  b: {command: [/bin/b], pool: other}\n"
    )

    commands = [source for source in sources(config_of(text).tree, []) if source.commands]

    assert [source.commands for source in commands] == [("a",), ("b",)]
    assert "a-secret" not in str(commands[1].plugin)


def test_sections_are_the_defaults_of_types_whose_author_says_nothing() -> None:
    infos = loaded(
        "workers: {job_timeout: 90s}\nretry: {max_attempts: 5, backoff: fixed, backoff_base: 7s}\n"
        "plugins:\n  - module: fixtures.greets\n"
    ).infos

    assert (infos["greet"].timeout, infos["greet"].retry.max_attempts) == (90.0, 5)
    assert infos["greet.patiently"].timeout == 1200.0
    assert infos["greet.patiently"].retry.max_attempts == 7
    assert infos["greet.patiently"].retry.backoff == "fixed"


def test_job_types_override_the_author_and_make_lanes() -> None:
    infos = loaded(
        "job_types:\n"
        "  greet: {timeout: 3s, priority: -5, retry: {max_attempts: 1, delays: [1s, 2m]}}\n"
        '  greet.later: {handler: greet, rate: "60/m", max_running: 2}\n'
        "plugins:\n  - module: fixtures.greets\n"
    ).infos

    assert infos["greet"].timeout == 3.0
    assert infos["greet"].priority == -5
    assert infos["greet"].retry.delays == (1.0, 120.0)
    assert infos["greet.later"].handler == "greet"
    assert infos["greet.later"].rate == 1.0
    assert infos["greet.later"].timeout == 300.0


def test_commands_of_the_file_are_job_types() -> None:
    infos = loaded(
        "job_types:\n"
        "  list.folder:\n"
        "    command: [/bin/ls, '{folder}']\n"
        "    params: {folder: '/[a-z]+'}\n"
        "    description: Lists a folder\n"
        "    timeout: 3s\n"
        "    cwd: /tmp\n"
        "    success_codes: [0, 2]\n"
    ).infos

    assert infos["list.folder"].description == "Lists a folder"
    assert infos["list.folder"].timeout == 3.0
    assert infos["list.folder"].schema["required"] == ["folder"]


def test_workers_types_are_all_that_a_node_has() -> None:
    registry = loaded("workers: {types: [sleep]}\n")

    assert list(registry.infos) == list(registry.plugins) == ["sleep"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        pytest.param(
            "job_types:\n  x: {handler: slep}\n",
            "t.yaml:2: job_types.x.handler: no plugin has a job type slep; did you mean sleep?",
            id="unknown handler",
        ),
        pytest.param(
            "job_types:\n  ecko: {timeout: 3s}\n",
            "t.yaml:2: job_types.ecko: no plugin has a job type ecko; did you mean echo?",
            id="unknown type",
        ),
        pytest.param(
            "workers:\n  types: [echo, slep]\n",
            "t.yaml:2: workers.types[1]: there is no job type slep; did you mean sleep?",
            id="unknown type of this node",
        ),
        pytest.param(
            "plugins:\n  - module: fixtures.wants_a_pool\n",
            "t.yaml:0: job_types.report: job type report of the plugin fixtures.wants_a_pool runs in the "
            "pool reports, which this file does not have: add pools.reports, or set job_types.report.pool",
            id="unknown pool of an author",
        ),
        pytest.param(
            "job_types:\n  echo:\n    command: [/bin/echo]\n",
            "t.yaml:3: job_types.echo.command: job type echo is declared by the plugin builtin already "
            "(duplicate); builtin can't have it too",
            id="command of a shipped name",
        ),
        pytest.param(
            "plugins:\n  - module: fixtures.echoes_too\n",
            "t.yaml:2: plugins[0]: job type echo is declared by the plugin builtin already (duplicate); "
            "fixtures.echoes_too can't have it too",
            id="declared twice",
        ),
        pytest.param(
            "plugins:\n  - module: fixtures.there_is_none\n",
            "t.yaml:2: plugins[0].module: there is no module 'fixtures.there_is_none' to import",
            id="no such module",
        ),
    ],
)
def test_what_does_not_fit_is_told_at_its_line(text: str, told: str) -> None:
    assert refused(text) == told


def test_an_author_s_pool_may_be_changed() -> None:
    text = "job_types:\n  report: {pool: default}\nplugins:\n  - module: fixtures.wants_a_pool\n"

    assert loaded(text).infos["report"].pool == "default"


def test_describing_children_do_not_see_our_environment() -> None:
    env: Mapping[str, str] = child_env({"DATABASE_URL": "x", "PYTHONPATH": str(FIXTURES)}, "n")

    assert "DATABASE_URL" not in env
    assert env["PYTHONPATH"] == str(FIXTURES)


@pytest.mark.parametrize(
    ("path", "message", "told"),
    [
        pytest.param(
            "config",
            "types.a.b.cwd: is wrong",
            "t.yaml:4: job_types.a.b.cwd: is wrong",
            id="own check",
        ),
        pytest.param(
            "config.types.a.b.cwd", "is wrong", "t.yaml:4: job_types.a.b.cwd: is wrong", id="schema"
        ),
        pytest.param("module", "is broken", "t.yaml:1: job_types: is broken", id="of all of them"),
    ],
)
def test_what_is_wrong_with_a_command_is_told_at_its_key(path: str, message: str, told: str) -> None:
    config = config_of("job_types:\n  a.b:\n    command: [/bin/a]\n    cwd: /tmp\n")
    (source,) = (one for one in sources(config.tree, []) if one.commands)
    found = PluginProblem(plugin=0, path=path, message=message)

    problems, _ = plugins.judge(config, [source], [Answer(source.plugin, [], [found])])

    assert [problem.show("t.yaml") for problem in problems] == [told]


def test_an_installed_plugin_that_is_broken_stops_the_start_and_is_named() -> None:
    config = config_of("log: {level: info}\n")
    source = Source(Plugin(name="other"), found=True)
    found = PluginProblem(plugin=0, path="name", message="its import raised RuntimeError")

    problems, warnings = plugins.judge(config, [source], [Answer(source.plugin, [], [found])])

    assert warnings == []
    assert "plugin other, which is installed, can't be used: its import raised" in problems[0].message
    assert "`name: other` with `enabled: false`" in problems[0].message
