"""The page that `make faults` writes never looks whole when it is not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs import manual
from tests.faults.rig.report import CASES, SCALE_VARIABLE, Report, listed

HERE = Path(__file__).parent


def report(*cases: str) -> Report:
    made = Report(postgres="18.0")
    for case in cases:
        made.add(case=case, load="none", faults="none", counts={"runs": 1}, worst="1", bound="2", seed=7)
    return made


def every() -> list[str]:
    return [f"F{number} a case" for number in CASES]


def test_a_whole_run_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SCALE_VARIABLE, raising=False)

    text = report(*every()).text()

    assert "Everything was run at full length. Every case has passed." in text
    assert "Not run" not in text
    assert "Failed" not in text


def test_cases_without_a_row_are_named() -> None:
    text = report(*(case for case in every() if case.split()[0] not in ("F6", "F27"))).text()

    assert "Not run, or not passed: F6, F27." in text


def test_a_failed_test_is_named_also_where_another_of_its_case_passed() -> None:
    made = report(*every())
    made.failed.append("test_f14_hints_that_never_arrive[lost]")

    assert "Failed: `test_f14_hints_that_never_arrive[lost]`." in made.text()
    assert "Every case has passed" not in made.text()


def test_a_shortened_run_says_by_how_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SCALE_VARIABLE, "0.05")

    assert f"`{SCALE_VARIABLE}` = 0.05, and the whole plan is 1." in report(*every()).text()


def test_rows_are_in_the_order_of_the_plan_and_hold_together() -> None:
    made = report("F10 later", "F2 earlier")
    made.add(case="F1 odd", load="a | b", faults="two\nlines", counts={}, worst="", bound="", seed=1)

    rows = [line for line in made.text().splitlines() if line.startswith("| F")]

    assert [row.split()[1] for row in rows] == ["F1", "F2", "F10"]
    assert rows[0] == r"| F1 odd | a \| b | two lines |  |  |  | 1 |"


def test_the_page_is_put_into_the_table_of_contents_once() -> None:
    once = listed(manual.text("docs/README.md"))

    assert once.count("](faults.md)") == 1
    assert listed(once) == once


@pytest.mark.parametrize("number", CASES)
def test_every_case_of_the_plan_has_a_test(number: int) -> None:
    texts = [path.read_text(encoding="utf-8") for path in HERE.glob("test_plan_*.py")]
    marked = [text for text in texts if "\npytestmark = pytest.mark.fault\n" in text]

    assert any(re.search(rf"^async def test_(f\d+_)*f{number}_", text, re.MULTILINE) for text in marked)
