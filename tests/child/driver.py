"""A supervisor's end of the pipe: starts a real job child and talks to it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import msgspec

from taskd.wire import (
    Completed,
    Finished,
    Log,
    Plugin,
    Progress,
    Reader,
    Setup,
    Start,
    Started,
    Stop,
    ToSupervisor,
    TypeSetup,
    frame,
)

ROOT = Path(__file__).parents[2]
PATIENCE_S = 30.0
"""How long a test waits for a child that says nothing before it fails."""


def child_env() -> dict[str, str]:
    """What a supervisor gives a child of its environment."""
    return {"PATH": os.defpath, "PYTHONPATH": str(ROOT), "TASKD_NODE": "test-node"}


class Child:
    """One job child. Leaving the `with` block closes the pipe, upon which the child must be gone."""

    def __init__(
        self,
        module: str,
        types: Sequence[str],
        *,
        isolation: str = "async",
        slots: int = 10,
        options: dict[str, Any] | None = None,
        type_options: dict[str, Any] | None = None,
        result_bytes: int = 64 * 1024,
        error_bytes: int = 8 * 1024,
        log_lines: int = 100,
        max_memory: int | None = None,
        grace_s: float = 5.0,
    ) -> None:
        """`types` are names, or `type=handler` where they differ."""
        pairs = [name.partition("=") for name in types]
        self.setup = Setup(
            node="test-node",
            child=1,
            plugins=[Plugin(module=module, options=options or {})],
            types=[
                TypeSetup(type=name, handler=handler or name, grace_s=grace_s, options=type_options or {})
                for name, _, handler in pairs
            ],
            slots=slots,
            isolation=isolation,
            result_bytes=result_bytes,
            error_bytes=error_bytes,
            log_lines=log_lines,
            max_memory=max_memory,
        )
        self._reader = Reader(ToSupervisor)
        self._next_run = 0
        self.seen: list[Any] = []
        """All messages so far, in order, one a run: what names several runs is taken apart."""

    def __enter__(self) -> Child:
        self.pipe, theirs = socket.socketpair()
        self.pipe.settimeout(PATIENCE_S)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "taskd.child", "--fd", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=child_env(),
            start_new_session=True,
        )
        theirs.close()
        self.pipe.sendall(frame([self.setup]))
        return self

    def __exit__(self, *_: object) -> None:
        self.pipe.close()
        try:
            self.out, self.err = self.process.communicate(timeout=PATIENCE_S)
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.communicate()

    def start(self, type: str, payload: Any = None, *, timeout_s: float = 60.0, **fields: Any) -> int:
        """Send a `Start` and return its run."""
        [run] = self.start_many([(type, payload or {})], timeout_s=timeout_s, **fields)
        return run

    def start_many(
        self,
        jobs: Sequence[tuple[str, Any]],
        *,
        timeout_s: float = 60.0,
        more: Sequence[Any] = (),
        **fields: Any,
    ) -> list[int]:
        """Send many `Start` in one frame, with `more` messages behind them."""
        starts = []
        for type, payload in jobs:
            self._next_run += 1
            raw = payload if isinstance(payload, bytes) else msgspec.json.encode(payload)
            members = {
                "attempt": 1,
                "max_attempts": 3,
                "client": "c",
                "job_id": f"job-{self._next_run}",
                **fields,
            }
            starts.append(
                Start(run=self._next_run, type=type, timeout_s=timeout_s, payload=msgspec.Raw(raw), **members)
            )
        self.send(*starts, *more)
        return [start.run for start in starts]

    def send(self, *messages: Any) -> None:
        self.pipe.sendall(frame(messages))

    def run(self, type: str, payload: Any = None, **fields: Any) -> Finished:
        """Start a job and return how it ended."""
        return self.finished(self.start(type, payload, **fields))

    def finished(self, run: int) -> Finished:
        """Return the end of `run`; raises `EOFError` when the child dies before."""
        return cast(Finished, self._until(lambda m: type(m) is Finished and m.run == run))

    def started(self, run: int) -> Started:
        return cast(Started, self._until(lambda m: type(m) is Started and m.runs == [run]))

    def ready(self) -> Any:
        """Return `Ready` or `Broken`, whichever the child says."""
        return self._until(lambda message: type(message) not in (Started, Finished, Log, Progress))

    def error(self, type: str, payload: Any = None, **fields: Any) -> str:
        """Start a job and return the error text it ended with."""
        return self.run(type, payload, **fields).error or ""

    def progress(self, run: int) -> Progress:
        return cast(Progress, self._until(lambda m: type(m) is Progress and m.run == run))

    def lines(self, run: int) -> list[str]:
        return [m.text for m in self.seen if type(m) is Log and m.run == run]

    def stop(self) -> int:
        """Send `Stop`, read to the end, and return the exit status."""
        self.send(Stop())
        self.read_to_end()
        return self.process.wait(PATIENCE_S)

    def read_to_end(self) -> None:
        """Read until the child has closed its end."""
        while self._read():
            pass

    def _until(self, wanted: Any) -> Any:
        looked = 0
        while True:
            for message in self.seen[looked:]:
                if wanted(message):
                    return message
            looked = len(self.seen)
            if not self._read():
                raise EOFError("the child closed the pipe")

    def _read(self) -> bool:
        try:
            data = self.pipe.recv(1 << 18)
        except ConnectionResetError:
            return False
        for message in self._reader.feed(data):
            if type(message) is Started:
                self.seen += [Started([run]) for run in message.runs]
            elif type(message) is Completed:
                ends = zip(message.runs, message.results, strict=True)
                self.seen += [Finished(run, "completed", True, result) for run, result in ends]
            else:
                self.seen.append(message)
        return bool(data)
