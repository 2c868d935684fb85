"""Keeps a job child harmless: bound to its supervisor, in a process group of its own, within limits.

Whatever a job starts belongs to the child's process group, and whoever is left in it is killed when
the child ends. Source: prctl(2), setrlimit(2).
"""

from __future__ import annotations

import ctypes
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Mapping
from typing import NoReturn, TextIO

from taskd.child.capture import JobLines, Printed, outside_jobs
from taskd.obs import log

_PR_SET_PDEATHSIG = 1


def bind_to_supervisor() -> None:
    """Have the kernel kill this process when its supervisor dies, and lead a process group.

    A supervisor that died before this call is noticed by the end of the pipe.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def ignore_stop_signals() -> None:
    """Go on when a SIGTERM or SIGINT is sent to all processes of a service: the supervisor drains.

    By a handler and not by SIG_IGN, which programs started by jobs would inherit.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)


def limit_memory(max_bytes: int | None) -> None:
    """Let allocations beyond `max_bytes` of private memory fail with `MemoryError`; None is no limit.

    RLIMIT_DATA and not RLIMIT_AS: mapped files and reserved address space are no memory in use.
    """
    if max_bytes is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (max_bytes, max_bytes))


def close_input() -> None:
    """Give jobs an empty standard input; what C code prints goes where the child's log goes."""
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)


def capture_output(environ: Mapping[str, str]) -> None:
    """Send the child's own log to standard error as JSON lines, and what jobs print to the jobs."""
    stream: TextIO = os.fdopen(os.dup(2), "w", encoding="utf-8", errors="backslashreplace")
    lines = log.setup("info", "json", stream, environ)
    lines.addFilter(outside_jobs)
    logging.getLogger().addHandler(JobLines())
    sys.stdout = Printed("info")
    sys.stderr = Printed("warning")


def own(pipe: socket.socket) -> None:
    """Keep the pipe from programs and processes that jobs start.

    A copy of this process made by `os.fork` in a handler must not speak for it.
    """
    pipe.set_inheritable(False)
    os.register_at_fork(after_in_child=pipe.close)


def die() -> NoReturn:
    """End this process and all that its jobs started, at once; for when the supervisor is gone."""
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def has_children() -> bool:
    """Whether a process that was started here still lives; dead ones are taken off the kernel's list."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True
