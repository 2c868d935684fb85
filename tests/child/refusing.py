"""A plugin that can be loaded and then refuses to start."""

from __future__ import annotations

from collections.abc import Mapping

from taskd.plugin import JobType, hookimpl, job


@job("greet")
async def greet() -> None: ...


@hookimpl
def taskd_job_types() -> list[JobType]:
    return [greet]


@hookimpl
async def taskd_child_started(options: Mapping[str, object]) -> None:
    raise ConnectionError(f"refused {options['api_key']}")
