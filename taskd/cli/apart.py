"""The start of a daemon in a copy of its process: what only the start needs ends with the copy.

Reading a configuration loads a YAML reader, a validator and the whole tree, several megabytes that a
daemon would keep for ever. The copy reads, says what it has found over a pipe, and is gone.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

import click

from taskd.errors import TaskdError
from taskd.process.prctl import die_with_parent


def apart(
    ctx: click.Context, work: Callable[[], bytes], *, meanwhile: Callable[[], object] = lambda: None
) -> bytes:
    """Return what `work` returns in a copy of this process, which must have one thread.

    `meanwhile` is done here until the copy has its answer. Of an expected failure there the text is shown
    here, and the command ends with its exit status. A signal that ends this process meanwhile ends the copy
    first.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    ours, theirs = os.pipe()
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        os.close(ours)
        _copy(parent, theirs, work)
    os.close(theirs)
    try:
        meanwhile()
        with os.fdopen(ours, "rb") as pipe:
            answer = pipe.read()
    except BaseException:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        raise
    finally:
        _, ended = os.waitpid(pid, 0)
    kind, said = answer[:1], answer[1:]
    if kind == b"a":
        return said
    if kind == b"f":
        failure = json.loads(said)
        click.echo(failure["said"], err=True)
        ctx.exit(failure["status"])
    ctx.exit(max(1, os.waitstatus_to_exitcode(ended)))


def _copy(parent: int, pipe: int, work: Callable[[], bytes]) -> NoReturn:
    """Do the work and end the process: it must never return into what called it."""
    from taskd.cli import exit_status, said

    status = 1
    try:
        die_with_parent(parent)
        answer = b"a" + work()
        status = 0
    except TaskdError as error:
        answer = b"f" + json.dumps({"said": said(error), "status": exit_status(error)}).encode()
    except SystemExit as end:
        answer, status = b"", end.code if isinstance(end.code, int) else 1
    except BaseException:
        answer = b""
        sys.excepthook(*sys.exc_info())
    with suppress(OSError):
        with os.fdopen(pipe, "wb") as out:
            out.write(answer)
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)
