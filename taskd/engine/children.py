"""What the supervisor knows of its job children: processes, the jobs in their hands, the pipes to them."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, cast

import msgspec

from taskd import wire
from taskd.model.jobtype import TypeInfo
from taskd.model.state import Cause
from taskd.model.verdict import Case
from taskd.process.family import Member
from taskd.process.keeper import Keeper
from taskd.store.leases import Claimed

log = logging.getLogger("taskd.engine.children")

LAST_WORDS_S = 1.0
"""A child whose pipe has closed is dead or ends by itself within this."""
FRAME_BYTES = 8 * 1024 * 1024
"""Payload bytes in one frame to a child, about."""
_PAGE = os.sysconf("SC_PAGE_SIZE")

Kind = Literal["async", "process", "lone"]
Heard = Callable[["Child", Sequence[object]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSettings:
    """A pool: `processes` async children, `concurrency` jobs at once over all its children."""

    processes: int
    concurrency: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CrewSettings:
    """What the crew needs to know; `plugins` by type name: which plugin a child of that type loads."""

    node_name: str
    infos: Mapping[str, TypeInfo]
    pools: Mapping[str, PoolSettings]
    plugins: Mapping[str, wire.Plugin]
    argv: Sequence[str]
    env: Mapping[str, str]
    pass_fds: Sequence[int]
    result_bytes: int
    error_bytes: int
    log_lines: int
    child_max_jobs: int | None = None
    """Jobs after which a child is replaced; None: never."""
    child_max_memory: int | None = None
    """Bytes in memory at which a child is replaced after its current jobs; None: never."""


class Run:
    """One job in a child's hands."""

    __slots__ = ("asked", "deadline", "handle", "info", "job", "killed", "started_at", "timeout_s")

    def __init__(self, job: Claimed, info: TypeInfo, handle: int) -> None:
        self.job = job
        self.info = info
        self.handle = handle
        self.started_at = 0.0
        """Monotonic seconds; 0 until the child says that the handler is called."""
        self.deadline = 0.0
        self.timeout_s = info.timeout if job.timeout_ms is None else min(info.timeout, job.timeout_ms / 1000)
        """How long it may take: the client's wish, never more than the type's."""
        self.asked: Cause | None = None
        """Why it was asked to stop."""
        self.killed: Cause | None = None
        """Why its process was killed, when that was on its account."""

    @property
    def case(self) -> Case:
        """The job as verdicts see it."""
        job = self.job
        return Case(
            attempts=job.attempts, max_attempts=job.max_attempts, crashes=job.crashes, alone=job.alone
        )


class Child(asyncio.Protocol):
    """One child process as the supervisor sees it; lives from its start to its end."""

    def __init__(self, heard: Heard, group: Group, number: int) -> None:
        """`heard` is called with what the process says: once a read, whatever number of jobs it is about."""
        self._heard = heard
        self.group = group
        self.number = number
        self.member: Member | None = None
        self.runs: dict[int, Run] = {}
        self.started: dict[int, Run] = {}
        self.ready = False
        self.stopping = False
        self.done = 0
        """Jobs that it has answered."""
        self.of_type: Counter[str] = Counter()
        self.idle_since = self.born_at = time.monotonic()
        self._reader = wire.Reader(wire.ToSupervisor)
        self._transport: asyncio.Transport | None = None
        self._outbox: list[msgspec.Struct] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send what gathered before the process was there."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        self.flush()

    def data_received(self, data: bytes) -> None:
        """Pass on the messages that are complete; a child that sends anything else is killed."""
        try:
            messages = self._reader.feed(data)
        except wire.BrokenFrame as error:
            log.error("child sent what is no message", extra={"child": self.number, "error": str(error)})
            self.kill()
            return
        self._heard(self, messages)

    def connection_lost(self, error: Exception | None) -> None:
        """Kill a child that lives on without its pipe: it can't say any more how its jobs end."""
        asyncio.get_running_loop().call_later(LAST_WORDS_S, self.kill)

    def send(self, message: msgspec.Struct) -> None:
        """Queue a message; `flush` sends all that gathered in one frame."""
        self._outbox.append(message)

    def flush(self) -> None:
        """Send what `send` queued, in frames far below what the other side takes for broken."""
        if self._outbox and self._transport is not None and not self._transport.is_closing():
            batch: list[msgspec.Struct] = []
            size = 0
            for message in self._outbox:
                size += memoryview(message.payload).nbytes if type(message) is wire.Start else 0
                batch.append(message)
                if size > FRAME_BYTES:
                    self._transport.write(wire.frame(batch))
                    batch, size = [], 0
            if batch:
                self._transport.write(wire.frame(batch))
            self._outbox = []

    def add(self, run: Run) -> None:
        """Have this child run it; `flush` sends it."""
        job = run.job
        self.runs[run.handle] = run
        self.of_type[job.type] += 1
        self.send(
            wire.Start(
                run.handle,
                job.type,
                job.id,
                job.attempts + 1,
                job.max_attempts,
                run.timeout_s,
                job.client,
                msgspec.Raw(job.payload.encode()),
            )
        )

    def remove(self, handle: int) -> Run | None:
        """Take a run that has ended off this child."""
        run = self.runs.pop(handle, None)
        self.started.pop(handle, None)
        if run is not None:
            self.of_type[run.job.type] -= 1
        return run

    def removed(self, handles: Iterable[int]) -> list[Run | None]:
        """Take runs that have ended off this child, in order; None for one that it does not have."""
        runs = [self.runs.pop(handle, None) for handle in handles]
        for run in runs:
            if run is not None:
                self.started.pop(run.handle, None)
                self.of_type[run.job.type] -= 1
        return runs

    def last_words(self) -> None:
        """Hear what the process said before it died: its death may be seen first."""
        pipe = None if self.member is None else self.member.pipe
        with suppress(OSError):
            while pipe is not None and (data := pipe.recv(256 * 1024)):
                self.data_received(data)

    def kill(self) -> None:
        """Kill the process with all that it started; its end is dealt with when it is seen."""
        if self.member is not None:
            self.member.kill()

    def close(self) -> None:
        """Drop the pipe; the process is dead."""
        if self._transport is not None:
            self._transport.abort()


class Group:
    """The children of one pool and kind."""

    def __init__(self, pool: str, kind: Kind, settings: PoolSettings, types: list[str]) -> None:
        self.pool = pool
        self.kind: Kind = kind
        self.types = types
        self.most = settings.processes if kind == "async" else 1 if kind == "lone" else settings.concurrency
        self.slots = -(-settings.concurrency // settings.processes) if kind == "async" else 1
        self.children: dict[int, Child] = {}
        self.keepers: dict[int, Keeper] = {}
        self.tasks: dict[int, asyncio.Task[object]] = {}


def resident(pid: int) -> int:
    """Return the bytes that a process has in memory; 0 when it is gone."""
    try:
        with open(f"/proc/{pid}/statm", "rb") as statm:
            return int(statm.read().split()[1]) * _PAGE
    except OSError:
        return 0
