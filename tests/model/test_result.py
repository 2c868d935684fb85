"""Whatever a handler returns becomes JSON that Postgres stores, or a reason why not."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskd.model.payload import storable
from taskd.model.result import Unstorable, encode

# Lone surrogates and U+0000 included: handlers return them.
texts = st.text(st.characters(exclude_categories=()))
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
)


@given(values)
def test_what_comes_out_is_accepted_by_the_strict_parser(value: Any) -> None:
    raw = encode(value, 1 << 20)

    assert storable(raw) is None or len(json.loads(raw)) < len(value)  # two keys may become one


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.text(st.characters(exclude_categories=["Cs"], min_codepoint=1))
        | st.floats(allow_nan=False, allow_infinity=False),
        lambda inner: st.lists(inner, max_size=4),
    )
)
def test_what_needs_no_repair_comes_out_as_it_went_in(value: Any) -> None:
    assert json.loads(encode(value, 1 << 20)) == value


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("depth", [0, 1, 64])
def test_depth_up_to_the_bound_is_kept(depth: int) -> None:
    assert json.loads(encode(nested(depth), 1 << 20)) == nested(depth)


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(nested(65), id="a level too deep"),
        pytest.param(nested(100_000), id="deeper than the stack"),
        pytest.param(2**1024, id="beyond a double"),
        pytest.param(-(2**1024), id="beyond a double, negative"),
        pytest.param(10**6000, id="more digits than Python writes"),
        pytest.param(object(), id="no JSON form"),
        pytest.param({(1, 2): 3}, id="keys that are no text"),
        pytest.param("x" * 2000, id="too large"),
        pytest.param("\ud800" * 400, id="too large once repaired"),
    ],
)
def test_what_can_not_be_stored_is_refused_with_a_reason(value: Any) -> None:
    with pytest.raises(Unstorable, match=r"."):
        encode(value, 1000)


def test_a_pydantic_model_is_known_by_its_method() -> None:
    class Model:
        def model_dump(self, *, mode: str) -> dict[str, str]:
            return {"mode": mode}

    assert encode([Model()], 1000) == b'[{"mode":"json"}]'
