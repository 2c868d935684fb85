"""The order of measurements, and that nothing measured is lost."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from bench.plan import OWN, Bench, Case, Length, cases
from bench.rounds import Record, load_record, measure, turns


def nothing(_: Bench) -> dict[str, float]:
    return {"per_s": 1}


def case(workload: str, subject: str, rounds: int = 2) -> Case:
    return Case(workload, subject, nothing, rounds=rounds)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """A benchmark of which measurements use nothing but its folder."""
    return cast("Bench", SimpleNamespace(cluster=SimpleNamespace(folder=tmp_path)))


@pytest.fixture
def record(tmp_path: Path) -> Record:
    return Record(tmp_path / "results" / "a.json", {"when": "now"})


def test_subjects_of_a_workload_take_turns_and_each_begins_a_round() -> None:
    planned = [(turn, one.subject) for turn, one in turns([case("w", "a"), case("w", "b"), case("v", "c")])]

    assert planned == [(1, "a"), (1, "b"), (2, "b"), (2, "a"), (1, "c"), (2, "c")]


def test_a_case_of_fewer_rounds_stays_out_of_the_later_ones() -> None:
    planned = [(turn, one.subject) for turn, one in turns([case("w", "a", 3), case("w", "b", 1)])]

    assert planned == [(1, "a"), (1, "b"), (2, "a"), (3, "a")]


def test_rounds_can_be_said() -> None:
    assert len(list(turns([case("w", "a", 3), case("w", "b", 1)], 5))) == 10


def test_a_failure_is_a_result_and_the_rest_goes_on(bench: Bench, record: Record) -> None:
    def fails(_: Bench) -> dict[str, float]:
        raise TimeoutError("jobs were left")

    said: list[str] = []
    measure(bench, [(1, Case("w", "a", fails)), (1, case("w", "b"))], record, said.append)

    assert [one.error for one in record.results] == ["TimeoutError: jobs were left", ""]
    assert [one.figures for one in record.results] == [{}, {"per_s": 1}]
    assert any("TimeoutError" in line for line in said)


def test_what_was_measured_before_an_interruption_is_in_the_file(bench: Bench, record: Record) -> None:
    def interrupted(_: Bench) -> dict[str, float]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(bench, [(1, case("w", "a")), (1, Case("w", "b", interrupted))], record, lambda _: None)

    found: dict[str, Any] = json.loads(record.path.read_text())
    assert [one["subject"] for one in found["results"]] == ["a"]


def test_a_record_reads_back(bench: Bench, record: Record) -> None:
    measure(bench, [(1, case("w", "a"))], record, lambda _: None)

    assert load_record(record.path) == record


def test_cases_of_one_workload_stand_together_in_each_length() -> None:
    for length in Length:
        names = [one.workload for one in cases(length, ())]
        assert sum(names[i] != names[i - 1] for i in range(1, len(names))) + 1 == len(set(names))


def test_the_short_form_is_taskd_and_postgresql_alone() -> None:
    chosen = cases(Length.SHORT, ())

    assert {one.subject.split()[0].strip(",") for one in chosen} == {"taskd", "raw"}
    assert len(chosen) < len(OWN)
