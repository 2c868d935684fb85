"""What a run's results say together: medians, and which measurements were taken on a busy machine."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from bench.noise import flagged
from bench.rounds import Result


@dataclass(slots=True)
class Summary:
    """One subject in one workload."""

    workload: str
    subject: str
    rounds: int = 0
    noisy: int = 0
    """Rounds whose probe was off; they are in the medians all the same."""
    figures: dict[str, float] = field(default_factory=dict)
    """The median of each figure."""
    spread: dict[str, float] = field(default_factory=dict)
    """Largest minus smallest, as a part of the median."""
    errors: list[str] = field(default_factory=list)


Summaries = dict[tuple[str, str], Summary]
"""By workload and subject, in the order of their first results."""


def summarize(results: Sequence[Result]) -> Summaries:
    """Return the medians of all good results."""
    found: Summaries = {}
    values: dict[tuple[str, str], list[dict[str, float]]] = {}
    for result, off in zip(results, flagged([one.probe for one in results]), strict=True):
        place = (result.workload, result.subject)
        summary = found.setdefault(place, Summary(*place))
        if result.error:
            summary.errors.append(result.error)
            continue
        summary.rounds += 1
        summary.noisy += off
        values.setdefault(place, []).append(result.figures)
    for place, rounds in values.items():
        for name in rounds[0]:
            these = [one[name] for one in rounds if name in one]
            middle = statistics.median(these)
            found[place].figures[name] = middle
            found[place].spread[name] = (max(these) - min(these)) / middle if middle else 0.0
    return found
