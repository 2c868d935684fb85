from __future__ import annotations

import os
from pathlib import Path

import pytest

from taskd.process.family import Family
from taskd.process.runtime import (
    NodeLock,
    NodeTaken,
    RuntimeFolderUnusable,
    node_file,
    runtime_folder,
    state_folder,
)

from .conftest import Outlet, python, shell

ME = os.geteuid()


def test_systemds_runtime_folder_wins(tmp_path: Path) -> None:
    environ = {"RUNTIME_DIRECTORY": f"{tmp_path}/a:{tmp_path}/b", "XDG_RUNTIME_DIR": f"{tmp_path}/x"}

    assert runtime_folder(environ, ME) == tmp_path / "a"


def test_then_the_users_runtime_folder(tmp_path: Path) -> None:
    assert runtime_folder({"XDG_RUNTIME_DIR": str(tmp_path)}, ME) == tmp_path / "taskd"


def test_then_the_state_folder(tmp_path: Path) -> None:
    environ = {"XDG_STATE_HOME": str(tmp_path / "state")}

    with pytest.raises(RuntimeFolderUnusable, match="belongs to user") if ME == 0 else _nothing():
        assert runtime_folder(environ, ME or 12345) == tmp_path / "state" / "taskd"

    assert (tmp_path / "state" / "taskd").is_dir()


class _nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *args: object) -> None: ...


@pytest.mark.parametrize(
    ("environ", "uid", "folder"),
    [
        pytest.param({"STATE_DIRECTORY": "/s:/t", "HOME": "/h"}, 5, "/s", id="systemd"),
        pytest.param({"HOME": "/root"}, 0, "/var/lib/taskd", id="root"),
        pytest.param({"XDG_STATE_HOME": "/x", "HOME": "/h"}, 5, "/x/taskd", id="xdg"),
        pytest.param({"HOME": "/h"}, 5, "/h/.local/state/taskd", id="user"),
    ],
)
def test_state_folder(environ: dict[str, str], uid: int, folder: str) -> None:
    assert state_folder(environ, uid) == Path(folder)


def test_a_new_runtime_folder_is_for_its_owner_alone(tmp_path: Path) -> None:
    folder = runtime_folder({"XDG_RUNTIME_DIR": str(tmp_path)}, ME)

    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeFolderUnusable, match="belongs to user"):
        runtime_folder({"RUNTIME_DIRECTORY": str(tmp_path)}, ME + 1)


def test_a_folder_that_can_not_be_made_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(RuntimeFolderUnusable, match="Set RUNTIME_DIRECTORY"):
        runtime_folder({"RUNTIME_DIRECTORY": str(tmp_path / "file" / "x")}, ME)


@pytest.mark.parametrize("node", ["../../etc/passwd", "a/b", ".", "x" * 500])
def test_a_node_name_never_leaves_the_folder(tmp_path: Path, node: str) -> None:
    path = node_file(tmp_path, node, "lock")
    path.touch()

    assert path.resolve().parent == tmp_path.resolve()


def test_a_second_start_of_the_node_is_refused_and_says_so(tmp_path: Path) -> None:
    path = node_file(tmp_path, "web-1", "lock")
    with NodeLock(path) as first, NodeLock(path) as second:
        first.acquire("web-1")

        with pytest.raises(
            NodeTaken, match=rf"process {os.getpid()} already runs as node 'web-1'"
        ) as refused:
            second.acquire("web-1")

    assert refused.value.exit_code == 1


def test_another_node_is_not_refused(tmp_path: Path) -> None:
    with NodeLock(node_file(tmp_path, "a", "lock")) as one, NodeLock(node_file(tmp_path, "b", "lock")) as two:
        one.acquire("a")
        two.acquire("b")


def test_a_link_in_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "node-a.lock").symlink_to(tmp_path / "precious")

    with pytest.raises(RuntimeFolderUnusable):
        NodeLock(tmp_path / "node-a.lock").acquire("a")

    assert not (tmp_path / "precious").exists()


async def test_children_do_not_hold_the_lock(tmp_path: Path, family: Family) -> None:
    lock = NodeLock(tmp_path / "lock")
    lock.acquire("a")
    child = await family.spawn(shell("exec sleep 1000"))

    lock.release()

    with NodeLock(tmp_path / "lock") as next_start:
        next_start.acquire("a")
    assert child.alive


async def test_a_supervisor_killed_with_9_frees_the_lock(
    tmp_path: Path, family: Family, outlet: Outlet
) -> None:
    script = f"""
import signal
from pathlib import Path
from taskd.process.runtime import NodeLock
lock = NodeLock(Path({str(tmp_path / "lock")!r}))
lock.acquire("a")
print("held", flush=True)
signal.pause()
"""
    supervisor = await family.spawn(python(script, stdout=outlet.write))
    outlet.line()
    with pytest.raises(NodeTaken, match=f"process {supervisor.pid}"):
        NodeLock(tmp_path / "lock").acquire("a")

    supervisor.kill()
    await supervisor.wait()

    with NodeLock(tmp_path / "lock") as next_start:
        next_start.acquire("a")
