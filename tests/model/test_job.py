"""Ids of jobs: version 7 UUIDs that sort by their time."""

from __future__ import annotations

from uuid import RFC_4122

from hypothesis import given
from hypothesis import strategies as st

from taskd.model.job import COMMAND_LINE, SCHEDULES, SQL, new_id

_times = st.integers(min_value=0, max_value=2**48 - 1)
_dice = st.binary(min_size=10, max_size=10)


@given(now_ms=_times, dice=_dice)
def test_an_id_is_a_version_7_uuid_with_its_time_in_front(now_ms: int, dice: bytes) -> None:
    made = new_id(now_ms, dice)

    assert (made.version, made.variant) == (7, RFC_4122)
    assert made.int >> 80 == now_ms


@given(one=_times, other=_times, dice=_dice, more=_dice)
def test_ids_sort_by_time_as_values_and_as_text(one: int, other: int, dice: bytes, more: bytes) -> None:
    first, second = new_id(one, dice), new_id(other, more)

    if one != other:
        assert (first < second) == (one < other)
        assert (str(first) < str(second)) == (one < other)


@given(dice=_dice, more=_dice)
def test_the_dice_tell_ids_of_one_millisecond_apart(dice: bytes, more: bytes) -> None:
    # 74 of the 80 bits stay: the others say version and variant.
    mask = ~(0xF << 76 | 0x3 << 62)
    same = int.from_bytes(dice, "big") & mask == int.from_bytes(more, "big") & mask

    assert (new_id(5, dice) == new_id(5, more)) == same


def test_reserved_clients_are_ids_that_no_job_gets() -> None:
    assert len({COMMAND_LINE, SQL, SCHEDULES}) == 3
    assert all(one.version == 7 and one.int >> 80 == 0 for one in (COMMAND_LINE, SQL, SCHEDULES))
