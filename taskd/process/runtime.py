"""Where a running daemon keeps its lock and control files, and the lock that keeps it single.

The supervisor's lock: one supervisor a node name on a host. It is never inherited, so it is free the
moment the supervisor is dead, and while it is held a second start is refused and nothing is killed.

(Here comes the second lock, inherited by the whole family, whose file names the incarnation: it frees
when all are gone, and a new start rescues by it.)
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from urllib.parse import quote

from taskd.errors import TaskdError


class RuntimeFolderUnusable(TaskdError):
    """The folder for lock and control files can't be made, or belongs to somebody else."""

    code = "runtime_folder"


class NodeTaken(TaskdError):
    """Another supervisor runs under the same `workers.node`."""

    code = "node_taken"


def state_folder(environ: Mapping[str, str], uid: int) -> Path:
    """Return where taskd keeps what outlives it; `uid` is the effective user.

    $STATE_DIRECTORY (systemd; the first of several), for root /var/lib/taskd, else
    $XDG_STATE_HOME/taskd or ~/.local/state/taskd.
    """
    if given := environ.get("STATE_DIRECTORY"):
        return Path(given.split(":")[0])
    if uid == 0:
        return Path("/var/lib/taskd")
    home = Path(environ.get("HOME") or "/")
    return Path(environ.get("XDG_STATE_HOME") or home / ".local" / "state") / "taskd"


def runtime_folder(environ: Mapping[str, str], uid: int) -> Path:
    """Return the folder for lock and control files, made if need be with access for its owner alone.

    $RUNTIME_DIRECTORY (systemd; the first of several), $XDG_RUNTIME_DIR/taskd, for root /run/taskd, else
    the state folder.

    Raises:
        RuntimeFolderUnusable: it can't be made, is no folder, or belongs to another user.
    """
    if given := environ.get("RUNTIME_DIRECTORY"):
        folder = Path(given.split(":")[0])
    elif given := environ.get("XDG_RUNTIME_DIR"):
        folder = Path(given) / "taskd"
    elif uid == 0:
        folder = Path("/run/taskd")
    else:
        folder = state_folder(environ, uid)
    fix = "Set RUNTIME_DIRECTORY to a folder of your own."
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        owner = folder.stat().st_uid
    except OSError as error:
        raise RuntimeFolderUnusable(f"{folder}: {error.strerror}. {fix}") from error
    if owner != uid and uid != 0:
        raise RuntimeFolderUnusable(f"{folder} belongs to user {owner}, not to {uid}. {fix}")
    return folder


def node_file(folder: Path, node: str, kind: str) -> Path:
    """Return the path of a file of `node` in the runtime folder; `kind` is its ending, `lock`."""
    name = quote(node, safe="")[:200]  # a file name holds 255 bytes
    return folder / f"node-{name}.{kind}"


class NodeLock:
    """The supervisor's own lock, held from `acquire` to `release` or to the death of the process.

    The file stays: removing it would let two supervisors lock two files of one name.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = -1

    def acquire(self, node: str) -> None:
        """Take the lock for `node`, without waiting.

        Raises:
            NodeTaken: another process holds it; the message names that process.
            RuntimeFolderUnusable: the file can't be opened.
        """
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise RuntimeFolderUnusable(f"{self.path}: {error.strerror}") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(fd, 20).decode("ascii", "replace").strip()
            os.close(fd)
            who = f"process {holder}" if holder.isdecimal() else "another process"
            raise NodeTaken(
                f"{who} already runs as node {node!r} on this host. "
                "Stop it first, or set workers.node to another name for this one."
            ) from error
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        self._fd = fd

    def release(self) -> None:
        """Give the lock back; nothing happens if it is not held."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> NodeLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
