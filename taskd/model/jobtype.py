"""A job type as data: what its author declared, overridden by what YAML says.

A child describes the types of its plugins in this form, the supervisor lays the file's `job_types:`
over it, the nodes publish the result in the database, and the API reads it from there. No plugin code
is needed to read it.
"""

from __future__ import annotations

from typing import Literal

import msgspec


class Retry(msgspec.Struct, frozen=True, kw_only=True):
    """When a failed attempt runs again; waits are in seconds.

    `delays` replaces the curve: the wait after attempt n is `delays[n-1]`, the last one repeats.
    `jitter` "full" draws each wait evenly between 0 and the curve, "none" takes the curve itself.
    """

    max_attempts: int = 3
    backoff: Literal["fixed", "linear", "exponential"] = "exponential"
    backoff_base: float = 2.0
    backoff_cap: float = 3600.0
    jitter: Literal["full", "none"] = "full"
    delays: tuple[float, ...] = ()


class TypeInfo(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Everything that taskd knows about one job type. Times are seconds, sizes bytes."""

    name: str
    handler: str
    """Name under which a plugin declared the code; differs from `name` for a second lane in YAML."""
    plugin: str
    """Which plugin has the handler: `builtin`, an entry point's name or a module's dotted name."""
    description: str = ""
    schema: dict[str, object] = {}
    """JSON Schema (2020-12) of the payload, an object type."""
    example: dict[str, object] | None = None
    secrets: tuple[str, ...] = ()
    """Top-level payload members that are masked wherever people look."""
    enabled: bool = True
    isolation: Literal["async", "process"] = "async"
    pool: str = "default"
    concurrency: int | None = None
    """Jobs of this type at once on a node; None is up to the pool."""
    max_running: int | None = None
    """Jobs of this type at once over all nodes, exact."""
    rate: float | None = None
    """Starts a second over all nodes, exact."""
    rate_burst: int | None = None
    """Starts that may come at once; None means 1."""
    timeout: float = 300.0
    grace: float = 5.0
    priority: int = 0
    """Priority of jobs submitted without one."""
    retry: Retry = Retry()
    restartable: bool = True
    max_backlog: int = 1_000_000
    retention: float | None = None
    """How long final rows of this type are kept; None is by the `retention` section."""
    max_memory: int | None = None
    options: dict[str, object] = {}

    @property
    def limited(self) -> bool:
        """Whether starts are counted by the database, and hence never prefetched."""
        return self.rate is not None or self.max_running is not None
