"""What a dead child left behind: processes that it started and that still run, or that nobody reaped.

A member of a family leads a session of its own. Its descendants keep that session, also in process
groups of their own, and once their parents are dead they become children of this process (it is a
subreaper). So they are found among this process' own children, by session. One that fled into another
session is known by `TASKD_NODE` in its environment; one of another session that is already dying is
only reaped. What something else in here started is spared: members, what the family was told of, and
whatever shares this process' own session.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from taskd.process.environment import NODE_VARIABLE

_PF_EXITING = 0x4
_MARK = f"{NODE_VARIABLE}=".encode()


@dataclass(frozen=True, slots=True)
class Kin:
    """One child of this process, as /proc tells it."""

    pid: int
    parent: int
    group: int
    session: int
    exiting: bool
    """It is dead, reaped or not, or past the point where a signal could matter."""


def kill_leftovers(dead: int, spared: Collection[int]) -> int | None:
    """Kill what the dead member `dead` left, reap what is dead of it, return one that still dies.

    `spared` are process ids, of living members and of what others started: they and their sessions are
    not touched. Call it again when the returned process has died: its own children may have come up
    meanwhile. None means that nothing is left. `dead` must not have been reaped before the first call,
    so that its number can't belong to somebody else; as long as a leftover keeps the session, the kernel
    keeps the number.
    """
    while True:
        left = [kin for kin in own_children() if kin.pid != dead and kin.pid not in spared]
        left = [kin for kin in left if _left_by(kin, dead, spared)]
        for kin in left:
            _kill(kin, dead)
        dying = [kin.pid for kin in left if not _reap(kin.pid)]
        if dying or not left:
            return dying[0] if dying else None
        # All of them were dead at once: look again, for their children are ours now.


def own_children() -> Iterator[Kin]:
    """Yield the children of this process that are alive or not yet reaped, in no order."""
    for pid in _child_pids():
        kin = _look(pid)
        if kin is not None and kin.parent == os.getpid():
            yield kin


def _left_by(kin: Kin, dead: int, spared: Collection[int]) -> bool:
    if kin.session == dead and dead not in spared:  # in it, the number belongs to a new member by now
        return True
    if kin.session in spared or kin.session == os.getsid(0):
        return False
    if kin.exiting:  # its environment is gone; reaping it harms nobody
        return True
    try:
        environ = Path(f"/proc/{kin.pid}/environ").read_bytes()
    except OSError:
        return False  # died meanwhile, or runs as another user: not ours to judge
    return environ.startswith(_MARK) or b"\0" + _MARK in environ


def _kill(kin: Kin, dead: int) -> None:
    if kin.exiting:
        return
    with suppress(OSError):
        os.kill(kin.pid, signal.SIGKILL)
    if kin.group not in (dead, os.getpgrp()):  # a command with its own group: all of it at once
        with suppress(OSError):
            os.killpg(kin.group, signal.SIGKILL)


def _reap(pid: int) -> bool:
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:
        return True


def _child_pids() -> Iterator[int]:
    threads = Path("/proc/self/task")
    if not (threads / str(os.getpid()) / "children").exists():  # a kernel without CONFIG_PROC_CHILDREN
        yield from (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal())
        return
    for thread in threads.iterdir():
        with suppress(OSError):  # the thread has ended meanwhile
            yield from map(int, (thread / "children").read_text().split())


def _look(pid: int) -> Kin | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    fields = stat[stat.rindex(")") + 2 :].split()  # the name before it may hold anything
    parent, group, session, flags = (int(fields[n]) for n in (1, 2, 3, 6))
    return Kin(pid, parent, group, session, exiting=bool(flags & _PF_EXITING))
