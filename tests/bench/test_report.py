"""What a run's results become: medians, marks of a busy machine, ratios, the manual's page."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import report
from bench.figures import summarize
from bench.noise import flagged
from bench.rounds import Record, Result
from bench.targets import RIVER, TARGETS, Found, Missing, Target

QUIET = {"cpu_ms": 20.0, "fsync_ms": 1.0}


def result(
    subject: str, value: float, *, workload: str = "drain", probe: dict[str, float] = QUIET, error: str = ""
) -> Result:
    return Result(workload, subject, 1, probe, 1.0, {} if error else {"jobs": 10, "per_s": value}, error)


def record(*results: Result) -> Record:
    return Record(Path("unused"), {"when": "2026-01-01T00:00:00+00:00"}, list(results))


def test_figures_are_medians_and_spread_is_told() -> None:
    found = summarize([result("taskd", value) for value in (100, 400, 200)])

    assert found["drain", "taskd"].figures == {"jobs": 10, "per_s": 200}
    assert found["drain", "taskd"].spread["per_s"] == pytest.approx(1.5)
    assert found["drain", "taskd"].rounds == 3


def test_a_failed_round_is_told_and_the_others_count() -> None:
    results = [result("taskd", 100), result("taskd", 0, error="TimeoutError: jobs were left")]

    summary = summarize(results)["drain", "taskd"]

    assert (summary.rounds, summary.figures["per_s"]) == (1, 100)
    assert summary.errors == ["TimeoutError: jobs were left"]


def test_a_probe_off_by_more_than_15_percent_is_flagged() -> None:
    probes = [QUIET, QUIET, QUIET, QUIET | {"cpu_ms": 23.1}, QUIET | {"fsync_ms": 0.84}]

    assert flagged(probes) == [False, False, False, True, True]


def test_a_probe_off_by_less_is_not() -> None:
    assert flagged([QUIET, QUIET, QUIET | {"cpu_ms": 22.9, "fsync_ms": 0.86}]) == [False] * 3
    assert flagged([]) == []


def test_a_busy_round_is_counted_where_it_was() -> None:
    busy = QUIET | {"cpu_ms": 60.0}
    results = [result("taskd", 1), result("taskd", 2, probe=busy), result("raw", 3), result("raw", 4)]

    found = summarize(results)

    assert (found["drain", "taskd"].noisy, found["drain", "raw"].noisy) == (1, 0)


def test_the_best_of_several_peers_is_the_one_compared_with() -> None:
    results = [result("taskd", 900), result("raw", 1000), result("pg-boss", 200), result("pgqueuer", 450)]
    target = next(one for one in TARGETS if "best of" in one.what)

    assert target.value(Found(summarize(results))) == 2


def test_river_stands_for_its_part_of_postgresql_alone() -> None:
    results = [result("taskd", 900), result("raw", 1000), result("pg-boss", 200)]
    target = next(one for one in TARGETS if "best of" in one.what)

    assert target.value(Found(summarize(results))) == pytest.approx(900 / (1000 * RIVER["drain"]))


def test_a_figure_that_was_not_measured_is_missing() -> None:
    found = Found(summarize([result("taskd", 1, error="OSError: x")]))

    with pytest.raises(Missing, match="drain: taskd"):
        found("drain", "taskd")


def test_bounds_hold_at_their_edge() -> None:
    assert Target("", lambda _: 0, 1.3).met(1.3)
    assert not Target("", lambda _: 0, 1.3).met(1.29)
    assert Target("", lambda _: 0, 8, at_most=True).met(8)
    assert not Target("", lambda _: 0, 8, at_most=True).met(8.01)


def test_targets_come_before_figures_and_a_missed_one_says_so() -> None:
    page = report.page(record(result("taskd", 400), result("raw", 1000)))

    assert page.index("## Ratios") < page.index("## Figures")
    line = next(line for line in page.splitlines() if "two clients" in line)
    assert line == "| drain: PostgreSQL alone, two clients | ≥ 0.45 × | 0.4 × | **missed** |"
    assert "Not measured in this run: " in page
    assert "| drain | taskd | 10 | **400/s** | 1 |  |" in page


def test_a_failure_stands_in_the_table_on_one_line() -> None:
    page = report.page(record(result("taskd", 0, error="RuntimeError: a\nb | c")))

    assert "| drain | taskd |  | **1 failed**: RuntimeError: a b / c | 0 |  |" in page
