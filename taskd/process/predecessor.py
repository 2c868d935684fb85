"""What an earlier start of this node left on this host, and whether any of it still lives.

A lock file that the whole family inherits: the lock is free only when every process that had the
descriptor is gone. A start that finds it held kills what holds it, known by `TASKD_NODE` and the file's
own number in the environment, and what was started by a command, which has the variables but not the
descriptor. Then nothing of the earlier start can run any more, and its jobs may be taken at once.

Only the holder of the supervisor's own lock (`runtime.NodeLock`) may do this.
"""

from __future__ import annotations

import fcntl
import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from taskd.process.environment import NODE_VARIABLE
from taskd.process.runtime import NodeTaken, RuntimeFolderUnusable

LOCK_VARIABLE = "TASKD_LOCK"
"""Names the lock file by device and inode in all that a start of a node runs."""

_STEP_S = 0.01


class FamilyLock:
    """The lock that a node's supervisor and all its children hold together. Owned by the supervisor."""

    def __init__(self, path: Path, node: str) -> None:
        """Open the file, made if need be.

        Raises:
            RuntimeFolderUnusable: the file can't be opened.
        """
        self._node = node
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            self.fd = os.open(path, flags, 0o600)
            """The descriptor that children must inherit."""
        except OSError as error:
            raise RuntimeFolderUnusable(f"{path}: {error.strerror}") from error
        stat = os.fstat(self.fd)
        self._mark = f"{stat.st_dev}:{stat.st_ino}"

    @property
    def env(self) -> dict[str, str]:
        """What the environment of all children must say."""
        return {NODE_VARIABLE: self._node, LOCK_VARIABLE: self._mark}

    def take_over(self, *, wait_s: float = 5.0) -> str:
        """Kill what is left of earlier starts, take the lock, and return what the last of them wrote.

        Raises:
            NodeTaken: something of an earlier start did not die within `wait_s` seconds.
        """
        end = time.monotonic() + wait_s
        while True:
            left = list(self._leftovers())
            for pid in left:
                with suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            with suppress(OSError):
                fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not left:
                    return os.pread(self.fd, 256, 0).decode("ascii", "replace").strip()
            if time.monotonic() > end:
                who = ", ".join(map(str, left)) or "unknown"
                raise NodeTaken(f"processes of an earlier start of node {self._node!r} do not end: {who}")
            time.sleep(_STEP_S)

    def write(self, text: str) -> None:
        """Leave `text` (ASCII, one short line) for the next start."""
        os.ftruncate(self.fd, 0)
        os.pwrite(self.fd, text.encode("ascii"), 0)

    def _leftovers(self) -> Iterator[int]:
        wanted = {f"{name}={value}".encode() for name, value in self.env.items()}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdecimal() or int(entry.name) == os.getpid():
                continue
            with suppress(OSError):  # it has ended, or is another user's
                if entry.stat().st_uid != os.geteuid():
                    continue
                environ = (entry / "environ").read_bytes().split(b"\0")
                if wanted.issubset(environ):
                    yield int(entry.name)

    def release(self) -> None:
        """Close our descriptor; the lock is free once the children's are closed too."""
        os.close(self.fd)

    def __enter__(self) -> FamilyLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
