"""A fixed piece of work before every measurement, to tell a round in which the machine was busy elsewhere."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

OFF = 0.15
"""A probe that differs by more than this from the median of its run marks its measurement."""

_TURNS = 300_000
_WRITES = 40


def probe(folder: Path) -> dict[str, float]:
    """Do the work, about 0.1 s of it, and return its times: `cpu_ms`, and `fsync_ms` in `folder`."""
    started = time.perf_counter()
    value = 1
    for _ in range(_TURNS):
        value = (value * 1103515245 + 12345) & 0x7FFFFFFF
    cpu_ms = 1000 * (time.perf_counter() - started)
    waits = []
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(_WRITES):
            file.write(b"x" * 8192)
            file.flush()
            started = time.perf_counter()
            os.fdatasync(file.fileno())
            waits.append(1000 * (time.perf_counter() - started))
    # The median of the writes: one slow write in forty is a disk's ordinary life.
    return {"cpu_ms": round(cpu_ms, 2), "fsync_ms": round(statistics.median(waits), 3)}


def flagged(probes: Sequence[dict[str, float]]) -> list[bool]:
    """Return for each probe whether it differs by more than `OFF` from the median of all of them."""
    if not probes:
        return []
    middle = {name: statistics.median(one[name] for one in probes) for name in probes[0]}
    return [any(abs(one[name] / middle[name] - 1) > OFF for name in middle) for one in probes]
