"""How long to wait before a failed attempt runs again.

The curves are tenacity's wait strategies, driven by an attempt number instead of its retry loop.

Source of "full jitter": "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
"""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import cast

import tenacity

from taskd.model.jobtype import Retry


def ceiling_s(retry: Retry, attempt: int) -> float:
    """Return the longest wait in seconds after failed attempt number `attempt`; the first is 1.

    >>> ceiling_s(Retry(), 3)
    8.0
    """
    if retry.delays:
        return min(retry.delays[min(attempt, len(retry.delays)) - 1], retry.backoff_cap)
    curve: tenacity.wait.wait_base
    if retry.backoff == "fixed":
        curve = tenacity.wait_fixed(retry.backoff_base)
    elif retry.backoff == "linear":
        curve = tenacity.wait_incrementing(
            start=retry.backoff_base, increment=retry.backoff_base, max=retry.backoff_cap
        )
    else:
        curve = tenacity.wait_exponential(multiplier=retry.backoff_base, max=retry.backoff_cap)
    state = cast(tenacity.RetryCallState, SimpleNamespace(attempt_number=attempt))
    return min(float(curve(state)), retry.backoff_cap)


def wait_s(retry: Retry, attempt: int, dice: random.Random) -> float:
    """Return the wait in seconds before the run that follows failed attempt number `attempt`."""
    ceiling = ceiling_s(retry, attempt)
    if retry.jitter == "none" or retry.delays:
        return ceiling
    return dice.uniform(0.0, ceiling)
