from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from taskd.process.prctl import PARENT_VARIABLE, supervised

from .conftest import environ


def run(script: str, **more: str) -> subprocess.CompletedProcess[str]:
    lines = f"from taskd.process.prctl import *\nimport os\n{script}"
    return subprocess.run([sys.executable, "-c", lines], env=environ(**more), capture_output=True, text=True)


def test_a_child_whose_parent_died_before_the_call_ends_at_once() -> None:
    ended = run("die_with_parent(os.getpid())")  # any number that is not the parent's

    assert ended.returncode == -signal.SIGKILL


def test_a_child_whose_parent_lives_goes_on() -> None:
    ended = run(f"die_with_parent({os.getpid()}); print('alive')")

    assert ended.stdout == "alive\n"


def test_the_supervisors_number_is_not_handed_on() -> None:
    script = "print(follow_supervisor(os.environ), 'TASKD_PARENT' in os.environ)"

    ended = run(script, **supervised({}))

    assert ended.stdout == "True False\n"


@pytest.mark.parametrize("number", ["", "x", "-1"])
def test_a_daemon_without_a_supervisor_follows_nobody(number: str) -> None:
    ended = run("print(follow_supervisor(os.environ))", **{PARENT_VARIABLE: number})

    assert ended.stdout == "False\n"
