"""Runs a program to its end and returns what it wrote, as `python -m taskd.child --describe` is run."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from taskd.process.family import Exit, Family, Spec


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """How a program ended and what it wrote; both outputs are cut at the caller's limit."""

    exit: Exit
    stdout: bytes
    stderr: bytes
    timed_out: bool
    """It was killed at the deadline."""


async def run_once(family: Family, spec: Spec, data: bytes, *, limit: int, deadline_s: float) -> Ran:
    """Run `spec` with `data` on its standard input and wait for its end, at most `deadline_s` seconds.

    Its output is kept in memory files, so a program that writes without end fills memory until the
    deadline; `limit` bounds, in bytes, what is returned of stdout and of stderr. When this task is
    cancelled the program is killed.

    Raises:
        SpawnFailed: it can't be started.
    """
    with _memory_file("in") as stdin, _memory_file("out") as stdout, _memory_file("err") as stderr:
        _fill(stdin, data)
        member = await family.spawn(replace(spec, stdin=stdin, stdout=stdout, stderr=stderr))
        try:
            done, _ = await asyncio.wait({member.exit}, timeout=deadline_s)
        finally:
            member.kill()
        end = await member.wait()
        return Ran(
            exit=end,
            stdout=os.pread(stdout, limit, 0),
            stderr=os.pread(stderr, limit, 0),
            timed_out=not done,
        )


@contextmanager
def _memory_file(name: str) -> Iterator[int]:
    fd = os.memfd_create(name)
    try:
        yield fd
    finally:
        os.close(fd)


def _fill(fd: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]
    os.lseek(fd, 0, os.SEEK_SET)
