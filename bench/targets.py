"""What taskd is to reach, as ratios of one run, and whether a run did.

River needs Go. Where it can't be had, its figures stand for their part of what PostgreSQL alone did in the
run in which both were measured (two cores, PostgreSQL 15): RIVER.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from bench.figures import Summaries

RIVER = {"drain": 0.31, "submit": 0.24, "bulk": 0.376, "together": 0.19}
"""Of the raw drain by two clients, raw single INSERTs, raw array INSERTs, and raw single INSERTs again."""


class Missing(Exception):
    """A figure that is needed was not measured."""


@dataclass(frozen=True, slots=True)
class Found:
    """Figures of a run, by workload, subject and name."""

    summaries: Summaries

    def __call__(self, workload: str, subject: str, name: str = "per_s") -> float:
        """Return the median.

        Raises:
            Missing: there is none.
        """
        summary = self.summaries.get((workload, subject))
        if summary is None or name not in summary.figures:
            raise Missing(f"{workload}: {subject}")
        return summary.figures[name]

    def any_of(self, wanted: Mapping[str, Callable[[], float]]) -> tuple[str, float]:
        """Return the best of those that were measured, with its name."""
        best: tuple[str, float] | None = None
        for name, value in wanted.items():
            try:
                one = value()
            except Missing:
                continue
            if best is None or one > best[1]:
                best = (name, one)
        if best is None:
            raise Missing(", ".join(wanted))
        return best


@dataclass(frozen=True, slots=True)
class Target:
    """A value that a run gives, and its bound."""

    what: str
    value: Callable[[Found], float]
    bound: float
    unit: str = "x"
    at_most: bool = False

    def met(self, value: float) -> bool:
        """Whether a value is within the bound."""
        return value <= self.bound if self.at_most else value >= self.bound


def _cpu(found: Found) -> float:
    return found("drain", "taskd", "worker_cpu_us_per_job") + found("drain", "taskd", "server_cpu_us_per_job")


def _best_queue(found: Found) -> float:
    raw = found("drain", "raw")
    queues = {name: (lambda name=name: found("drain", name)) for name in ("pg-boss", "pgqueuer")}
    _, best = found.any_of({**queues, "River": lambda: RIVER["drain"] * raw})
    return found("drain", "taskd") / best


def _of(one: tuple[str, str], other: tuple[str, str], name: str = "per_s") -> Callable[[Found], float]:
    return lambda found: found(*one, name) / found(*other, name)


def _at(workload: str, subject: str, name: str) -> Callable[[Found], float]:
    return lambda found: found(workload, subject, name)


_DRAIN, _RAW = ("drain", "taskd"), ("drain", "raw")
_HTTP, _INSERT = ("submit", "taskd"), ("submit", "raw")
_HELD = "churn, snapshot held"
_LONG_HELD = "churn of 10 minutes, snapshot held"

TARGETS = (
    Target("drain: the best of pg-boss, pgqueuer and River", _best_queue, 1.3),
    Target("drain: PostgreSQL alone, two clients", _of(_DRAIN, _RAW), 0.45),
    Target("drain: CPU a job, worker and store", _cpu, 37, "µs", at_most=True),
    Target("drain: graphile-worker", _of(_DRAIN, ("drain", "graphile-worker")), 1.04),
    Target("drain, the hard goal: PostgreSQL alone", _of(_DRAIN, _RAW), 0.68),
    Target("drain, the hard goal: CPU a job", _cpu, 26, "µs", at_most=True),
    Target("drain, processes, 4 slots", _at("drain, processes", "taskd", "per_s"), 8000, "/s"),
    Target("submit over HTTP: Fastify + pg", _of(_HTTP, ("submit", "fastify")), 1.25),
    Target("submit over HTTP: Sanic + pool", _of(_HTTP, ("submit", "sanic-insert")), 2.3),
    Target("submit over HTTP: a bare Sanic route", _of(_HTTP, ("submit", "sanic-bare")), 0.65),
    Target("submit over HTTP, 32 connections, p99", _at(*_HTTP, "p99_ms"), 8, "ms", at_most=True),
    Target("bulk over HTTP", _at("bulk", "taskd", "per_s"), 50_000, "/s"),
    Target(
        "`taskd.submit`, 32 producers: River",
        lambda found: found("submit", "taskd by SQL") / (RIVER["submit"] * found(*_INSERT)),
        2,
    ),
    Target("`taskd.submit`: plain INSERT", _of(("submit", "taskd by SQL"), _INSERT), 0.5),
    Target(
        "`taskd.submit_many`: River",
        lambda found: found("bulk", "taskd by SQL") / (RIVER["bulk"] * found("bulk", "raw")),
        1.2,
    ),
    Target("submit to start, SQL with wake, p50", _at("latency", "taskd by SQL", "p50_ms"), 2, "ms", True),
    Target("submit to start, SQL with wake, p99", _at("latency", "taskd by SQL", "p99_ms"), 3.5, "ms", True),
    Target("submit to start, HTTP, p50", _at("latency", "taskd", "p50_ms"), 3, "ms", True),
    Target("submit to start, HTTP, p99", _at("latency", "taskd", "p99_ms"), 6, "ms", True),
    Target("submit to start, half load, p99", _at("latency, half load", "taskd", "p99_ms"), 25, "ms", True),
    Target(
        "submit and work together: River",
        lambda found: found("together", "taskd", "done_per_s") / (RIVER["together"] * found(*_INSERT)),
        1.5,
    ),
    Target(
        "1 000 000 over 20 types: the rate with 50 000",
        _of(("20 types, 1 000 000", "taskd"), ("20 types, 50 000", "taskd")),
        0.95,
    ),
    Target("... claim p99", _at("20 types, 1 000 000", "taskd", "claim_p99_ms"), 15, "ms", True),
    Target(
        "50 000 beside 1 000 000 for tomorrow: alone",
        _of(("50 000 beside 1 000 000 for tomorrow", "taskd"), _DRAIN),
        0.95,
    ),
    Target("snapshot held, after 60 s of churn", _at(_HELD, "taskd", "drain_per_s"), 20_000, "/s"),
    Target("... claim p99", _at(_HELD, "taskd", "claim_p99_ms"), 15, "ms", True),
    Target(
        "... 10 minutes: its last 10 s against its first",
        lambda found: (
            found(_LONG_HELD, "taskd", "last_10_s_per_s") / found(_LONG_HELD, "taskd", "first_10_s_per_s")
        ),
        0.95,
    ),
    Target("churn while rows are pruned: without", _of(("churn, pruning", "taskd"), ("churn", "taskd")), 0.9),
    Target(
        "5 minutes at 70 %: p99 of the last minute against the first",
        lambda found: (
            found("5 minutes at 70 %", "taskd", "last_p99_ms")
            / found("5 minutes at 70 %", "taskd", "first_p99_ms")
        ),
        1.25,
        at_most=True,
    ),
    Target("idle: CPU", _at("idle", "taskd", "cpu_percent"), 1, "% of a core", True),
    Target("idle: transactions", _at("idle", "taskd", "transactions_per_s"), 2, "/s", True),
    Target("idle: memory (PSS)", _at("idle", "taskd", "pss_mib"), 120, "MiB", True),
    Target("idle: connections", _at("idle", "taskd", "connections"), 6, "", True),
    Target("`taskd --help`", _at("start", "taskd", "help_ms"), 150, "ms", True),
    Target("start to ready", _at("start", "taskd", "ready_ms"), 1500, "ms", True),
)
