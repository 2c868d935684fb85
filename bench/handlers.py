"""The job types that are measured, as a plugin of taskd: `- module: bench.handlers`."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import msgspec

from taskd.plugin import JobType, hookimpl, job

Address = Annotated[str, msgspec.Meta(min_length=3, max_length=320, pattern="@")]
Subject = Annotated[str, msgspec.Meta(min_length=1, max_length=200)]

_stamps: list[int] = []
"""The descriptor that `stamp` writes to, if there is one."""


@job("mail")
async def mail(to: Address, subject: Subject, text: str = "") -> dict[str, str]:
    """Do nothing with a payload that has a schema, as most payloads do."""
    return {"to": to}


@job("noop", payload=dict)
async def noop(payload: dict[str, Any]) -> None:
    """Do nothing in a process shared with others."""


@job("noop-process", payload=dict, isolation="process")
def noop_process(payload: dict[str, Any]) -> None:
    """Do nothing in a process of its own."""


def _nothing() -> None:
    pass


@job("noop-thread", payload=dict)
async def noop_thread(payload: dict[str, Any]) -> None:
    """Do nothing in a thread, as handlers do that call a library which blocks."""
    await asyncio.to_thread(_nothing)


@job("stamp")
async def stamp(n: str) -> None:
    """Write down when the handler started, by the clock that the load client reads too."""
    now = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    os.write(_stamps[0], b"%s %d\n" % (n.encode(), now))


@hookimpl
def taskd_options_schema() -> Mapping[str, object]:
    """Take the file that `stamp` writes to."""
    return {"type": "object", "properties": {"stamps": {"type": "string"}}, "additionalProperties": False}


@hookimpl
def taskd_job_types(options: Mapping[str, object]) -> Sequence[JobType]:
    """Declare them all."""
    path = options.get("stamps")
    if isinstance(path, str) and not _stamps:
        _stamps.append(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600))
    return [mail, noop, noop_process, noop_thread, stamp]
