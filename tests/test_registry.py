"""The registry: what plugins declare in processes of their own, with the file's changes laid over it."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from taskd import registry, wire
from taskd.errors import PluginError
from taskd.model.jobtype import Retry, TypeInfo
from taskd.process.environment import child_env
from taskd.registry import Answer, describe, merge
from taskd.wire import Plugin

MAILER, OTHER = Plugin(name="mailer"), Plugin(name="other")
MAIL = TypeInfo(
    name="mail", handler="mail", plugin="mailer", timeout=20.0, retry=Retry(max_attempts=9, backoff_base=5.0)
)
ARGV = [sys.executable, "-m", "taskd.child"]


def one(plugin: Plugin, *infos: TypeInfo) -> Answer:
    return Answer(plugin, infos, ())


# -- merge -----------------------------------------------------------------------------------------------


def test_without_changes_types_are_as_declared() -> None:
    merged = merge([one(MAILER, MAIL)], {})

    assert merged.infos == {"mail": MAIL}
    assert merged.plugins == {"mail": MAILER}


def test_the_file_overrides_the_author_member_by_member() -> None:
    changes: Mapping[str, Mapping[str, object]] = {"mail": {"pool": "slow", "retry": {"max_attempts": 2}}}

    changed = merge([one(MAILER, MAIL)], changes).infos["mail"]

    assert (changed.pool, changed.timeout) == ("slow", 20.0)
    assert changed.retry == Retry(max_attempts=2, backoff_base=5.0)


def test_one_handler_serves_two_types() -> None:
    merged = merge([one(MAILER, MAIL)], {"bulk": {"handler": "mail", "rate": 1.0}})

    assert set(merged.infos) == {"mail", "bulk"}
    bulk = merged.infos["bulk"]
    assert (bulk.name, bulk.handler, bulk.rate, bulk.timeout) == ("bulk", "mail", 1.0, 20.0)
    assert merged.plugins["bulk"] == MAILER
    assert merged.infos["mail"].rate is None


def test_two_plugins_with_one_type_are_refused_by_name() -> None:
    theirs = TypeInfo(name="mail", handler="mail", plugin="other")

    with pytest.raises(PluginError, match="mail is declared by mailer and by other"):
        merge([one(MAILER, MAIL), one(OTHER, theirs)], {})


def test_a_handler_that_nobody_has_is_refused_with_those_there_are() -> None:
    with pytest.raises(PluginError, match=r"job_types\.bulk: no plugin has a job type post; known are mail"):
        merge([one(MAILER, MAIL)], {"bulk": {"handler": "post"}})


# -- describe --------------------------------------------------------------------------------------------


async def described(tmp_path: Path, *sources: str) -> list[Answer]:
    """Describe plugins made of these sources."""
    env = child_env({**os.environ, "PYTHONPATH": str(tmp_path)}, "n")
    plugins = []
    for number, source in enumerate(sources):
        (tmp_path / f"plugin_{number}.py").write_text(source)
        plugins.append(wire.Plugin(module=f"plugin_{number}"))
    return await describe(plugins, argv=ARGV, env=env)


GOOD = """
from taskd.plugin import hookimpl, job
@job("{name}")
async def run() -> None:
    "Do it."
@hookimpl
def taskd_job_types(options):
    return [run]
"""


async def test_each_plugin_is_described_in_the_order_given(tmp_path: Path) -> None:
    answers = await described(tmp_path, GOOD.format(name="a"), GOOD.format(name="b"))

    assert [[info.name for info in answer.types] for answer in answers] == [["a"], ["b"]]
    assert [answer.problems for answer in answers] == [(), ()] or not any(a.problems for a in answers)


async def test_a_plugin_that_takes_its_process_down_is_named_and_harms_no_other(tmp_path: Path) -> None:
    bad, good = await described(tmp_path, "import os; os._exit(7)", GOOD.format(name="b"))

    assert [problem.message for problem in bad.problems] == [
        "plugin plugin_0 ended its process while it was loaded (exit code 7)"
    ]
    assert [info.name for info in good.types] == ["b"]


async def test_a_plugin_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "DESCRIBE_TIMEOUT_S", 0.3)

    [answer] = await described(tmp_path, "import time; time.sleep(1000)")

    assert answer.types == ()
    assert "took longer than 0.3 s" in answer.problems[0].message


async def test_what_a_plugin_prints_is_no_answer(tmp_path: Path) -> None:
    [answer] = await described(tmp_path, 'print("{}")\n' + GOOD.format(name="a"))

    assert [info.name for info in answer.types] == ["a"]
