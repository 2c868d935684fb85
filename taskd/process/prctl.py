"""Two switches of the Linux kernel that tie a tree of processes together.

*Death signal*: a child asks to be killed when its parent dies, so a supervisor killed with -9 leaves
nothing behind. Two traps: the kernel ties it to the parent's *thread*, so children are started from
the main thread alone (`family` refuses others); and `fork` forgets it, so every child asks by itself.
*Subreaper*: orphans of a dead child come to the nearest subreaper instead of to process 1, so whoever
watches the child can find and kill them.

Source: prctl(2), PR_SET_PDEATHSIG and PR_SET_CHILD_SUBREAPER.
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Mapping, MutableMapping

PARENT_VARIABLE = "TASKD_PARENT"
"""How a daemon learns the process id of the `taskd up` above it; taken out again at start."""

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def die_with_parent(parent: int | None = None) -> None:
    """Have this process killed with SIGKILL when its parent dies; call it first thing in `main`.

    `parent` is the process id that the parent must have. When it has another by now, the parent died
    before the call, and this process ends itself at once. None means whoever is the parent now: then a
    parent that died earlier is not noticed here, and the end of the caller's pipe must tell.

    Raises:
        OSError: the kernel refused.
    """
    expected = os.getppid() if parent is None else parent
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != expected:
        os.kill(os.getpid(), signal.SIGKILL)


def become_subreaper() -> None:
    """Have orphans of this process' descendants become its own children from now on.

    Raises:
        OSError: the kernel refused.
    """
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def supervised(environ: Mapping[str, str]) -> dict[str, str]:
    """Return `environ` for a daemon that is to die with this process; see `follow_supervisor`."""
    return {**environ, PARENT_VARIABLE: str(os.getpid())}


def follow_supervisor(environ: MutableMapping[str, str]) -> bool:
    """Die with the parent if `environ` was made by its `supervised`; says whether it was.

    The variable is taken out, so that nothing this process starts believes to be meant.
    """
    parent = environ.pop(PARENT_VARIABLE, "")
    if not parent.isdecimal():
        return False
    die_with_parent(int(parent))
    return True


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    zero = ctypes.c_ulong(0)
    if libc.prctl(option, ctypes.c_ulong(value), zero, zero, zero) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl({option}): {os.strerror(code)}")
