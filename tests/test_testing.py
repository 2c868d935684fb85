"""What plugin authors test with: one job in process, without a database."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import msgspec
import pytest

from taskd.plugin import Context, Fail, JobType, Snooze, job
from taskd.testing import run, run_async


@job("greet", timeout="10s")
async def greet(name: Annotated[str, msgspec.Meta(min_length=1)], *, ctx: Context) -> dict[str, Any]:
    ctx.progress(50, "half way")
    ctx.log.info("greeting %s", name)
    print("hello")
    ctx.submit("greet", {"name": "next"})
    return {"text": f"hello {name}", "attempt": ctx.attempt, "resources": ctx.resources, **ctx.options}


def test_a_run_hands_back_all_that_the_handler_did() -> None:
    outcome = run(greet, {"name": "Ada"}, attempt=2, options={"a": 1}, resources="r")

    assert outcome.kind == "completed"
    assert outcome.result == {"text": "hello Ada", "attempt": 2, "resources": "r", "a": 1}
    assert outcome.progress == (50.0, "half way")
    assert outcome.lines == ("greeting Ada",)
    assert outcome.submitted == ({"type": "greet", "payload": {"name": "next"}},)


@pytest.mark.parametrize("payload", [{}, {"name": ""}, {"name": 1}, {"name": "Ada", "x": 1}])
def test_a_payload_is_checked_as_at_the_door(payload: dict[str, Any]) -> None:
    assert run(greet, payload).kind == "invalid_payload"


@job("plain")
def plain(how: str, *, ctx: Context) -> int:
    if how == "fail":
        raise Fail("no")
    if how == "snooze":
        raise Snooze("5s")
    if how == "check":
        while True:
            ctx.check()
    return len(how)


@pytest.mark.parametrize(
    ("how", "kind"), [("well", "completed"), ("fail", "fail"), ("snooze", "snoozed"), ("check", "timeout")]
)
def test_a_plain_def_runs_in_this_thread(how: str, kind: str) -> None:
    assert run(plain, {"how": how}, timeout=0.05).kind == kind


@job("wait")
async def wait() -> None:
    await asyncio.sleep(3600)


def test_an_async_def_times_out() -> None:
    outcome = run(wait, {}, timeout=0.01)

    assert (outcome.kind, outcome.error) == ("timeout", "timed out after 0.01 s")


async def test_in_a_running_loop_there_is_run_async() -> None:
    assert (await run_async(greet, {"name": "Ada"})).kind == "completed"
    assert (await run_async(plain, {"how": "well"})).result == 4


def test_a_result_that_can_not_be_stored_is_null_with_a_line() -> None:
    outcome = run(JobType(name="odd", run=lambda: object()), {})

    assert (outcome.kind, outcome.result) == ("completed", None)
    assert "the result is not kept" in outcome.lines[0]
