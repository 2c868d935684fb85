"""What a part of the node does when Postgres refuses its work: it waits, and says so once for each cause.

No answer of Postgres ends a node. What may pass by itself is tried again; what nobody thought of is tried
again as well, because a node that ends helps nobody and the next one would get the same answer.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable

from taskd.errors import TaskdError, Unforeseen
from taskd.store.pool import Link, NotConnected
from taskd.store.sqlstate import cause

FIRST_S = 0.1
LONGEST_S = 2.0
"""Between two tries on a connection that holds; one that broke has a pace of its own."""
SILENT_S = 60.0
"""How long a cause is not said again."""


class Patience:
    """The failures in a row of one kind of work. Owned by the task that does it."""

    def __init__(
        self,
        log: logging.Logger,
        event: str,
        link: Link,
        dice: random.Random,
        *,
        level: int = logging.WARNING,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`event` is the text of the log line, `link` that of the work."""
        self._log = log
        self._event = event
        self._link = link
        self._dice = dice
        self._level = level
        self._clock = clock
        self._failures = 0
        self._said: dict[str, float] = {}

    def fine(self) -> None:
        """The work was done."""
        self._failures = 0

    def failed(self, error: TaskdError, **facts: object) -> float:
        """Say why, unless that was said a short while ago; return the seconds to wait before the next try."""
        self._failures += 1
        self._say(error, facts)
        if not self._link.connected:
            return max(self._link.wait_s, FIRST_S)
        longest_s = min(LONGEST_S, FIRST_S * 2.0 ** min(self._failures - 1, 10))
        return self._dice.uniform(longest_s / 2, longest_s)

    def _say(self, error: TaskdError, facts: dict[str, object]) -> None:
        name, now = cause(error), self._clock()
        if isinstance(error, NotConnected) and self._failures > 1:
            return  # the outage was told when it began
        if now - self._said.get(name, now - SILENT_S) < SILENT_S:
            return
        self._said[name] = now
        level = logging.ERROR if isinstance(error, Unforeseen) else self._level
        self._log.log(level, self._event, extra={"error": str(error), **facts})
