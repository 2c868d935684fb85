"""What the runs of the fault plan measured, as a page of the manual."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import psycopg

from taskd import __version__

SCALE_VARIABLE = "TASKD_FAULT_SCALE"

CASES = (*range(1, 21), *range(22, 33))
"""The numbers of the cases of the fault plan; F21 comes with schedules."""

_LISTED = "- [The fault plan](faults.md): what `make faults` measured, case by case"
_LISTED_BEHIND = "- [Performance](performance.md)"

_HEAD = """\
# The fault plan: what was measured

Written by `make faults`; not edited by hand. Each row is one run of one case: it passed, so nothing that
was accepted is lost and no second run is without a cause.

{length} {missing}

{versions}; {machine}; {minutes:.0f} min in all.

| Case | Load | Faults | Counts | Worst figure | Bound | Seed |
|---|---|---|---|---|---|---|
"""


def scale() -> float:
    """Return by how much durations and rounds are shortened: 1 is the whole plan."""
    return float(os.environ.get(SCALE_VARIABLE) or 1.0)


def scaled(value: float, least: float) -> float:
    """Return a duration or number of rounds of the plan, shortened, never below `least`."""
    return max(least, value * scale())


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One run of one case."""

    case: str
    load: str
    faults: str
    counts: str
    worst: str
    bound: str
    seed: int


@dataclass(slots=True)
class Report:
    """The lines of a session. Owned by the fixture `report`."""

    postgres: str
    """The version of the server."""
    lines: list[Line] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    """Names of the tests that failed."""
    since: float = field(default_factory=time.monotonic)

    def add(self, *, seed: int, counts: dict[str, int], **texts: str) -> None:
        """Take a passed run in; `texts` are the members of `Line` that are text."""
        shown = ", ".join(f"{name} {count}" for name, count in counts.items())
        line = Line(counts=shown, seed=seed, **texts)
        self.lines.append(line)
        print(line)

    def text(self) -> str:
        """Return the page."""
        versions = f"taskd {__version__}, PostgreSQL {self.postgres}, psycopg {psycopg.__version__}"
        versions += f", Python {platform.python_version()}"
        length = "Everything was run at full length."
        if scale() != 1:
            length = (
                f"Durations and rounds were shortened: `{SCALE_VARIABLE}` = {scale():g}, and the whole plan"
                " is 1. Bounds are never shortened."
            )
        head = _HEAD.format(
            length=length,
            missing=self._missing(),
            versions=versions,
            machine=f"Linux on {os.cpu_count()} cores",
            minutes=(time.monotonic() - self.since) / 60,
        )
        rows = []
        for one in sorted(self.lines, key=lambda line: (_number(line.case), line.case)):
            texts = (one.case, one.load, one.faults, one.counts, one.worst, one.bound, str(one.seed))
            cells = (" ".join(text.replace("|", "\\|").split()) for text in texts)
            rows.append(f"| {' | '.join(cells)} |")
        return head + "\n".join(rows) + "\n"

    def _missing(self) -> str:
        """Say which cases have no row, and which tests failed: a page of a part must not look whole."""
        there = {_number(line.case) for line in self.lines}
        without = [f"F{number}" for number in CASES if number not in there]
        told = []
        if without:
            told.append(f"Not run, or not passed: {', '.join(without)}.")
        if self.failed:
            told.append(f"Failed: {', '.join(f'`{name}`' for name in self.failed)}.")
        return " ".join(told) or "Every case has passed."


def listed(contents: str) -> str:
    """Return the manual's table of contents with the page in it."""
    if "](faults.md)" in contents:
        return contents
    lines = contents.splitlines(keepends=True)
    place = _place(lines)
    return "".join([*lines[:place], f"{_LISTED}\n", *lines[place:]])


def _place(lines: Sequence[str]) -> int:
    for place, line in enumerate(lines):
        if line.startswith(_LISTED_BEHIND):
            return place + 1
    raise ValueError("the table of contents has no line on performance, behind which this page stands")


def _number(case: str) -> int:
    match = re.match(r"F(\d+) ", case)
    if match is None:
        raise ValueError(f"a case is called after its number in the plan, and not {case!r}")
    return int(match[1])
