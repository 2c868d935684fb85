"""The plugin of the demonstration: a job that fails twice and then succeeds."""

from __future__ import annotations

from collections.abc import Mapping

from taskd.plugin import Context, JobType, hookimpl, job


@job("flaky", timeout="10s", retry={"max_attempts": 5, "delays": ["200ms"]})
async def flaky(fails: int = 2, *, ctx: Context) -> dict[str, object]:
    """Fail `fails` times, then succeed."""
    if ctx.attempt <= fails:
        raise ConnectionError(f"the other side hung up (attempt {ctx.attempt})")
    return {"succeeded_at_attempt": ctx.attempt}


@hookimpl
def taskd_job_types(options: Mapping[str, object]) -> list[JobType]:
    """Declare the demonstration's job type."""
    return [flaky]
