"""`echo` and `sleep`, for trying taskd out: one hands its payload back, one takes its time."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from msgspec import Meta

from taskd.plugin import Context, JobType, hookimpl, job


@job("echo", payload=dict)
async def echo(payload: dict[str, Any]) -> dict[str, Any]:
    """Return the payload as it is.

    Example: {"text": "hello"}
    """
    return payload


@job("sleep", timeout="65m")
async def sleep(seconds: Annotated[float, Meta(ge=0, le=3600)], *, ctx: Context) -> dict[str, float]:
    """Wait for a number of seconds, from 0 to 3600.

    Example: {"seconds": 1}
    """
    ctx.progress(0, f"sleeping for {seconds:g} s")
    await asyncio.sleep(seconds)
    return {"slept": seconds}


@hookimpl
def taskd_job_types(options: Mapping[str, object]) -> Sequence[JobType]:
    """Declare both; there is nothing to configure."""
    del options
    return [echo, sleep]


@hookimpl
def taskd_options_schema() -> Mapping[str, object]:
    """Take no options."""
    return {"type": "object", "properties": {}}
