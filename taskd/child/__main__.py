"""`python -m taskd.child`: a process for plugin code.

`--fd N` runs jobs that a supervisor sends over the socket with that number. `--describe` reads a
`wire.Describe` from standard input and writes a `wire.Described`; `--check` also asks the plugins'
`taskd_check`. Secrets come over the pipe and the standard input only.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import socket
import sys
from collections.abc import Sequence

import msgspec
import uvloop

from taskd.child import guard
from taskd.child.load import NotLoaded, check, describe
from taskd.child.loop import LoopChild
from taskd.child.outbox import frames
from taskd.child.solo import SoloChild
from taskd.child.stage import Stage
from taskd.model.payload import clean_text
from taskd.obs.redact import REDACTOR
from taskd.wire import Broken, Describe, Reader, Ready, Setup, ToChild

_log = logging.getLogger("taskd.child")

_USAGE = "usage: python -m taskd.child --fd N | --describe | --check"
_MAX_PROBLEM = 8 * 1024


def main(arguments: Sequence[str]) -> int:
    """Do what the one option says and return the exit status."""
    if list(arguments) in (["--describe"], ["--check"]):
        return _describe(with_checks=arguments[0] == "--check")
    if len(arguments) == 2 and arguments[0] == "--fd" and arguments[1].isdecimal():
        return _work(int(arguments[1]))
    print(_USAGE, file=sys.stderr)
    return 2


def _describe(*, with_checks: bool) -> int:
    asked = msgspec.json.decode(sys.stdin.buffer.read(), type=Describe)
    # Nothing that a plugin prints may get into the answer.
    answer = os.dup(1)
    guard.close_input()
    guard.capture_output(os.environ)
    described = check(asked.plugins) if with_checks else describe(asked.plugins)
    with os.fdopen(answer, "wb") as out:
        out.write(msgspec.json.encode(described))
    return 0


def _work(number: int) -> int:
    guard.bind_to_supervisor()
    guard.ignore_stop_signals()
    guard.close_input()
    guard.capture_output(os.environ)
    pipe = socket.socket(fileno=number)
    guard.own(pipe)
    reader = Reader(ToChild)
    setup, messages = _setup(pipe, reader)
    try:
        stage = Stage(setup)
    except NotLoaded as refused:
        return _broken(pipe, str(refused))
    guard.limit_memory(setup.max_memory)
    if setup.isolation == "async":
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_loop_child(pipe, reader, setup, stage, messages))
    # Not closed at the end: a job may have left it nothing to close itself with.
    runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
    return _solo_child(pipe, reader, setup, stage, runner, messages)


def _setup(pipe: socket.socket, reader: Reader) -> tuple[Setup, list[object]]:
    """Return the setup, the first message of all, and what came along with it."""
    while data := pipe.recv(256 * 1024):
        messages = reader.feed(data)
        if messages:
            setup = messages.pop(0)
            if not isinstance(setup, Setup):
                raise SystemExit("taskd.child: the first message is no setup")
            return setup, messages
    guard.die()


async def _loop_child(
    pipe: socket.socket, reader: Reader, setup: Setup, stage: Stage, messages: list[object]
) -> int:
    try:
        lanes = await stage.open()
    except NotLoaded as refused:
        return _broken(pipe, str(refused))
    pipe.setblocking(False)
    child = LoopChild(pipe, reader, setup.slots, setup.log_lines)
    _settle_memory()
    child.outbox.put(Ready(os.getpid()))
    child.begin(lanes, messages)
    await child.done.wait()
    await stage.close()
    return 0


def _solo_child(
    pipe: socket.socket,
    reader: Reader,
    setup: Setup,
    stage: Stage,
    runner: asyncio.Runner,
    messages: list[object],
) -> int:
    try:
        lanes = runner.run(stage.open())
    except NotLoaded as refused:
        return _broken(pipe, str(refused))
    child = SoloChild(pipe, reader, runner, setup.log_lines)
    _settle_memory()
    child.outbox.put(Ready(os.getpid()))
    child.work(lanes, messages)
    try:
        runner.run(stage.close())
    except OSError:  # a job has used up all descriptors; every run was answered
        _log.warning("taskd_child_stopping could not be called", exc_info=True)
    return 0


def _settle_memory() -> None:
    # What is loaded now stays: the collector need not look at it again with every job.
    gc.collect()
    gc.freeze()


def _broken(pipe: socket.socket, problem: str) -> int:
    pipe.setblocking(True)
    for data in frames([Broken(clean_text(REDACTOR.text(problem), _MAX_PROBLEM))]):
        pipe.sendall(data)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
