"""The two types for trying out."""

from __future__ import annotations

import pytest

from taskd.builtin.echo import echo, sleep
from taskd.testing import run


@pytest.mark.parametrize(
    "payload",
    [
        pytest.param({}, id="empty"),
        pytest.param({"text": "é", "list": [1, 2.5, None, True], "object": {"a": {}}}, id="all kinds"),
        pytest.param({"number": 2**70, "double": 1e308}, id="large numbers"),
    ],
)
def test_echo_returns_its_payload(payload: dict[str, object]) -> None:
    assert run(echo, payload).result == payload


def test_sleep_takes_its_seconds() -> None:
    outcome = run(sleep, {"seconds": 0})

    assert outcome.result == {"slept": 0}
    assert outcome.progress == (0, "sleeping for 0 s")


@pytest.mark.parametrize(
    "payload", [{}, {"seconds": -1}, {"seconds": 3601}, {"seconds": "1"}, {"seconds": 1, "x": 1}]
)
def test_sleep_refuses_what_it_can_not_sleep(payload: dict[str, object]) -> None:
    assert run(sleep, payload).kind == "invalid_payload"


def test_sleep_ends_by_its_timeout() -> None:
    assert run(sleep, {"seconds": 3600}, timeout=0.01).kind == "timeout"
