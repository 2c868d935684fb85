"""What the runs of the fault plan measured, as a page of the manual."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass, field

import psycopg

from taskd import __version__

SCALE_VARIABLE = "TASKD_FAULT_SCALE"

_HEAD = """\
# The fault plan: what was measured

Written by `make faults`; not edited by hand. Each row is one run of one case: it passed, so nothing that
was accepted is lost and no second run is without a cause. Bounds are never shortened; durations and rounds
are, by `{variable}` = {scale:g}.

{versions}; {machine}.

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
        head = _HEAD.format(
            variable=SCALE_VARIABLE,
            scale=scale(),
            versions=versions,
            machine=f"Linux on {os.cpu_count()} cores",
        )
        rows = []
        for one in sorted(self.lines, key=lambda line: (len(line.case.split()[0]), line.case)):
            cells = (one.case, one.load, one.faults, one.counts, one.worst, one.bound, str(one.seed))
            rows.append(f"| {' | '.join(cells)} |")
        return head + "\n".join(rows) + "\n"
