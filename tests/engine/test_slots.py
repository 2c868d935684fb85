"""How many jobs of which type a node takes: never more than it starts soon."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskd.engine.slots import MOST_A_CLAIM, MOST_HELD, Slots
from taskd.model.jobtype import TypeInfo


def info(name: str, **members: Any) -> TypeInfo:
    return TypeInfo(name=name, handler=name, plugin="test", **members)


def slots(*infos: TypeInfo, **pools: int) -> Slots:
    made = Slots(infos, pools or {"default": 10})
    for one in infos:
        made.set_open(one.pool, one.isolation, True)
    return made


def busy(made: Slots, name: str, *, jobs: int, ran_ms: int, round_trip_s: float = 0.005) -> None:
    """Have jobs of a type claimed and ended over some claims, ten a claim and a hundred claims a second."""
    for turn in range(jobs // 10):
        for _ in range(10):
            made.take(name)
            made.release(name, ran_ms)
        made.measured(round_trip_s, 100 + turn / 100, [name])


def test_free_slots_of_a_pool_are_wanted_of_every_type() -> None:
    made = slots(info("a"), info("b"))
    made.take("a")

    demands, budgets = made.demands(0)

    assert {name: demand.most for name, demand in demands.items()} == {"a": 9, "b": 9}
    assert budgets == [9]


def test_pools_have_slots_of_their_own() -> None:
    made = slots(info("a"), info("b", pool="slow"), default=2, slow=1)
    made.take("b")

    demands, budgets = made.demands(0)

    assert list(demands) == ["a"]
    assert budgets == [2, 0]


def test_a_type_takes_no_more_than_its_own_concurrency() -> None:
    made = slots(info("a", concurrency=2))
    made.take("a")

    assert made.demands(0)[0]["a"].most == 1
    made.take("a")
    assert made.demands(0)[0] == {}


def test_types_whose_children_are_not_there_take_nothing() -> None:
    made = slots(info("a"), info("b", isolation="process"))
    made.set_open("default", "process", False)

    assert list(made.demands(0)[0]) == ["a"]


def test_a_quick_type_is_fetched_ahead() -> None:
    made = slots(info("a"))
    busy(made, "a", jobs=500, ran_ms=1)

    demand = made.demands(0)[0]["a"]

    assert demand.ahead >= 5
    assert demand.most == 10 + demand.ahead


@pytest.mark.parametrize(
    "members",
    [
        pytest.param({"rate": 5.0}, id="a rate: the claim is the start"),
        pytest.param({"max_running": 5}, id="as many over all nodes"),
        pytest.param({"concurrency": 5}, id="as many on this node: a child starts what it has"),
    ],
)
def test_limited_types_are_not_fetched_ahead(members: dict[str, Any]) -> None:
    made = slots(info("a", **members))
    busy(made, "a", jobs=500, ran_ms=1)

    assert made.demands(0)[0]["a"].ahead == 0


def test_slow_jobs_that_end_together_are_not_fetched_ahead() -> None:
    made = slots(info("a"))
    busy(made, "a", jobs=500, ran_ms=10_000)

    assert made.demands(0)[0]["a"].ahead == 0


def test_jobs_that_were_handed_back_unrun_do_not_make_a_type_quick() -> None:
    made = slots(info("a"))
    for turn in range(50):
        for _ in range(10):
            made.take("a")
            made.release("a", None)
        made.measured(0.005, 100 + turn / 100, ["a"])

    assert made.demands(0)[0]["a"].ahead == 0


def test_a_type_that_fell_quiet_is_not_fetched_ahead() -> None:
    made = slots(info("a"))
    busy(made, "a", jobs=500, ran_ms=1)
    for turn in range(30):
        made.measured(0.005, 200 + turn, ["a"])

    assert made.demands(0)[0]["a"].ahead == 0


@given(held=st.integers(min_value=0, max_value=MOST_HELD), unsettled=st.integers(min_value=0, max_value=9000))
def test_a_node_holds_a_bounded_number_of_jobs(held: int, unsettled: int) -> None:
    made = slots(info("a"), default=10 * MOST_HELD)
    for _ in range(held):
        made.take("a")

    demands, _ = made.demands(unsettled)

    most = sum(demand.most for demand in demands.values())
    assert most <= min(MOST_A_CLAIM, max(0, MOST_HELD - held - unsettled))
    assert (most > 0) == (held + unsettled < MOST_HELD)


@given(
    moves=st.lists(st.tuples(st.sampled_from(["a", "b"]), st.booleans(), st.integers(0, 5000)), max_size=200)
)
def test_what_is_taken_and_released_adds_up(moves: list[tuple[str, bool, int]]) -> None:
    made = slots(info("a", concurrency=3), info("b"), default=5)
    held = {"a": 0, "b": 0}
    for step, (name, takes, ran_ms) in enumerate(moves):
        demands, _ = made.demands(0)
        if takes and name in demands:
            made.take(name)
            held[name] += 1
        elif not takes and held[name]:
            made.release(name, ran_ms)
            held[name] -= 1
        made.measured(0.005, float(step), ["a", "b"])

        assert made.held == sum(held.values())
        assert held["a"] <= 3
        assert made.demands(0)[1] == [5 - sum(held.values())]
