"""Runs measurements in turns and keeps every result in a file as soon as it is there."""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from bench.noise import probe
from bench.plan import Bench, Case


@dataclass(frozen=True, slots=True)
class Result:
    """One measurement: its figures, or why there are none."""

    workload: str
    subject: str
    round: int
    probe: dict[str, float]
    """Of `bench.noise`, from just before it."""
    seconds: float
    figures: dict[str, float] = field(default_factory=dict)
    error: str = ""


@dataclass(slots=True)
class Record:
    """All of a run, in `path` after each step."""

    path: Path
    about: dict[str, Any]
    """When, where and with what it was measured."""
    results: list[Result] = field(default_factory=list)

    def add(self, result: Result) -> None:
        """Append a result."""
        self.results.append(result)
        self.save()

    def save(self) -> None:
        """Write the file whole, or leave the one that is there."""
        text = json.dumps({**self.about, "results": [asdict(one) for one in self.results]}, indent=1)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        beside.write_text(text + "\n", encoding="utf-8")
        beside.replace(self.path)


def load_record(path: Path) -> Record:
    """Read what `save` wrote."""
    found = json.loads(path.read_text(encoding="utf-8"))
    results = [Result(**one) for one in found.pop("results")]
    return Record(path, found, results)


def turns(cases: Iterable[Case], rounds: int | None = None) -> Iterator[tuple[int, Case]]:
    """Yield each case once a round, cases of one workload in turns, each round beginning with another.

    `rounds` stands in place of each case's own. Cases of one workload stand together in `cases`.
    """
    for _, group in groupby(cases, key=lambda case: case.workload):
        subjects = list(group)
        most = max(rounds or case.rounds for case in subjects)
        for turn in range(most):
            first = turn % len(subjects)
            for case in subjects[first:] + subjects[:first]:
                if turn < (rounds or case.rounds):
                    yield turn + 1, case


def measure(
    bench: Bench, planned: Sequence[tuple[int, Case]], record: Record, say: Callable[[str], None]
) -> None:
    """Measure what is planned; a failure is a result too, and the rest goes on."""
    for number, (turn, case) in enumerate(planned, 1):
        before = probe(bench.cluster.folder)
        started = time.perf_counter()
        figures: dict[str, float] = {}
        error = ""
        try:
            figures = case.measure(bench)
        except Exception as problem:
            error = f"{type(problem).__name__}: {problem}"
            say(traceback.format_exc())
        seconds = round(time.perf_counter() - started, 1)
        record.add(Result(case.workload, case.subject, turn, before, seconds, figures, error))
        shown = error or ", ".join(f"{name} {value:,g}" for name, value in figures.items())
        say(f"[{number}/{len(planned)}] {case.workload}: {case.subject}, round {turn}, {seconds} s: {shown}")
