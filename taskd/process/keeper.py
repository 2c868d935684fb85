"""Keeps one child alive: starts it again when it ends, not faster than is good for the machine."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

from taskd.process.family import Exit, Family, Member, SpawnFailed, Spec

EX_CONFIG = 78
"""The exit code of a child that can't work with its configuration: the next start would end the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How fast a child that ends is started again, in seconds.

    Starts are at least `base_s` apart. Each further *quick death* in a row (the child lived less than
    `steady_s` and nobody called it healthy) doubles that, never above `cap_s`.
    """

    base_s: float = 1.0
    cap_s: float = 30.0
    steady_s: float = 10.0

    def wait_s(self, quick_deaths: int, lived_s: float) -> float:
        """Return how long to wait after the end of a child that lived `lived_s`.

        >>> Pace().wait_s(0, 0.25), Pace().wait_s(0, 60.0), Pace().wait_s(3, 0.0)
        (0.75, 0.0, 4.0)
        """
        doublings = min(max(quick_deaths - 1, 0), 30)  # further ones change nothing under the cap
        return max(0.0, min(self.cap_s, self.base_s * 2.0**doublings) - lived_s)


class Keeper:
    """Runs one child after the other under one name. Owned by the task that awaits `run`.

    To replace a child without a gap, start a second keeper and `stop` the first once the new child is
    ready.
    """

    def __init__(
        self,
        family: Family,
        spec: Callable[[], Spec],
        *,
        started: Callable[[Member], None] = lambda member: None,
        ended: Callable[[Member, Exit], None] = lambda member, end: None,
        pace: Pace = Pace(),
    ) -> None:
        """`spec` is asked before each start; `started` and `ended` are told of each child.

        Both are called in the loop, `ended` before the wait for the next start; what they raise ends
        `run`.
        """
        self.family = family
        self.member: Member | None = None
        """The child that lives now."""
        self.quick_deaths = 0
        """In a row, up to now."""
        self._spec = spec
        self._started = started
        self._ended = ended
        self._pace = pace
        self._ending = asyncio.Event()
        self._healthy = False

    async def run(self) -> Exit | None:
        """Start the child, and again whenever it ends, until `end` or `stop`, or exit code 78.

        Returns the last exit; None if none was ever started. When this task is cancelled the child is
        killed.
        """
        last: Exit | None = None
        starts = 0
        while not self._ending.is_set():
            if starts:
                self.family.metrics.inc("taskd_respawns_total")
            starts += 1
            lived_s = 0.0
            try:
                member = await self.family.spawn(self._spec())
            except SpawnFailed as error:
                self.quick_deaths += 1
                self.family.log.error("child can't be started", extra={"error": str(error)})
            else:
                last = await self._live(member)
                lived_s = last.lived_s
                if last.code == EX_CONFIG:
                    break
            if not self._ending.is_set():
                await self._pause(self._pace.wait_s(self.quick_deaths, lived_s))
        return last

    def healthy(self) -> None:
        """Say that the present child does its work: its death will not count as a quick one."""
        self._healthy = True

    def end(self) -> None:
        """Start no further child; the present one has been asked to end, or is about to be."""
        self._ending.set()

    async def stop(self, grace_s: float) -> None:
        """End this keeper and its child: SIGTERM, `grace_s` seconds later SIGKILL."""
        self.end()
        if self.member is not None:
            await self.member.stop(grace_s)

    async def _live(self, member: Member) -> Exit:
        self.member = member
        self._healthy = False
        try:
            self._started(member)
            end = await member.wait()
        finally:
            self.member = None
            member.kill()
        asked = self._ending.is_set()
        orderly = self._healthy or end.code == 0 or end.lived_s >= self._pace.steady_s
        self.quick_deaths = 0 if orderly or asked else self.quick_deaths + 1
        level = logging.INFO if asked or end.code == 0 else logging.WARNING
        facts = {"child": member.name, "pid": member.pid, "exit": str(end), "lived_s": round(end.lived_s, 3)}
        self.family.log.log(level, "child ended", extra=facts)
        self._ended(member, end)
        return end

    async def _pause(self, wait_s: float) -> None:
        if wait_s > 0:
            try:
                await asyncio.wait_for(self._ending.wait(), wait_s)
            except TimeoutError:
                return
