"""The lock that a node's whole family holds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from taskd.process.predecessor import FamilyLock
from taskd.process.runtime import NodeTaken

SLEEPER = "import sys, time; print('up', flush=True); time.sleep(600)"


def start(lock: FamilyLock, *, inherits: bool, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """Start a process of the family and return once it runs."""
    process = subprocess.Popen(
        [sys.executable, "-c", SLEEPER],
        env={"PATH": os.defpath, **(lock.env if env is None else env)},
        pass_fds=(lock.fd,) if inherits else (),
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    return process


def test_the_next_start_reads_what_the_last_one_wrote(tmp_path: Path) -> None:
    with FamilyLock(tmp_path / "family", "node") as first:
        assert first.take_over() == ""
        first.write("12 4711")

    with FamilyLock(tmp_path / "family", "node") as second:
        assert second.take_over() == "12 4711"


def test_a_child_that_outlived_its_supervisor_is_killed_by_the_next_start(tmp_path: Path) -> None:
    with FamilyLock(tmp_path / "family", "node") as first:
        first.take_over()
        child = start(first, inherits=True)

    with FamilyLock(tmp_path / "family", "node") as second:
        second.take_over()

    assert child.wait(10) == -9


def test_what_a_command_started_is_killed_though_it_does_not_hold_the_lock(tmp_path: Path) -> None:
    with FamilyLock(tmp_path / "family", "node") as first:
        first.take_over()
        command = start(first, inherits=False)

    with FamilyLock(tmp_path / "family", "node") as second:
        second.take_over()

    assert command.wait(10) == -9


def test_a_node_of_the_same_name_with_another_lock_file_is_left_alone(tmp_path: Path) -> None:
    with FamilyLock(tmp_path / "other", "node") as other, FamilyLock(tmp_path / "family", "node") as ours:
        other.take_over()
        child = start(other, inherits=True)

        ours.take_over()

        assert child.poll() is None
        child.kill()
        child.wait(10)


def test_a_holder_that_nobody_may_kill_is_named(tmp_path: Path) -> None:
    with FamilyLock(tmp_path / "family", "node") as first:
        first.take_over()
        # It holds the lock but lacks the marks: not ours to kill.
        stranger = start(first, inherits=True, env={})

    with FamilyLock(tmp_path / "family", "node") as second, pytest.raises(NodeTaken, match="do not end"):
        second.take_over(wait_s=0.1)

    stranger.kill()
    stranger.wait(10)
