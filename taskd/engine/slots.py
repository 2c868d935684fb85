"""How many jobs of which type this node may take now.

A type may have as many jobs here as its pool has room, and, where it starts quickly, as many more as it
starts within about two round trips of a claim: that keeps children fed without holding back jobs from
other nodes. Slow types and limited ones are never fetched ahead.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from taskd.model.jobtype import TypeInfo
from taskd.store.leases import Demand

ROUND_TRIPS = 2.0
LEAST_S = 0.025
"""For how many seconds of work jobs of a quick type are fetched ahead at least: a claim for few jobs costs
Postgres nearly as much as one for many (docs/decisions/0007)."""
MOST_AHEAD = 2000
"""Jobs of one type that are fetched ahead at most, whatever the rate."""
QUICK_S = 0.05
"""Below this, how long a run seems to take is for the most part how long we take to hear of it."""
MOST_A_CLAIM = 1000
"""Jobs of one type that one claim statement asks for at most."""
MOST_HELD = 6000
"""Jobs that this node holds at most, unsettled ones included: bounds memory while Postgres is away."""

_WEIGHT = 0.3
"""Of the newest measurement in the moving averages."""


@dataclass(slots=True)
class _Type:
    info: TypeInfo
    held: int = 0
    """Handed out or waiting for a child here."""
    ended: int = 0
    """Runs that ended since `since`, when this type was last claimed."""
    since: float = 0.0
    rate: float = 0.0
    """Runs that end per second while there is work, averaged."""
    run_s: float = 1.0
    """How long a run takes, averaged."""


@dataclass(slots=True)
class _Pool:
    concurrency: int
    held: int = 0
    missing: int = 0
    """Slots of children that are being started anew."""


class Slots:
    """Counts what is held, by type and pool; owned by the supervisor's loop."""

    def __init__(self, infos: Iterable[TypeInfo], pools: Mapping[str, int]) -> None:
        """`pools` gives each pool's jobs at once."""
        self._types = {info.name: _Type(info) for info in infos if info.enabled}
        self._pools = {name: _Pool(concurrency) for name, concurrency in pools.items()}
        self._index = {name: index for index, name in enumerate(self._pools)}
        self._round_trip_s = 0.005
        self._open: dict[tuple[str, str], bool] = {}
        self.held = 0
        """Jobs that this node holds claims of and that have not ended here."""

    def set_open(self, pool: str, isolation: str, is_open: bool) -> None:
        """Say whether the children of a pool and isolation can take jobs."""
        self._open[pool, isolation] = is_open

    def set_missing(self, pool: str, slots: int) -> None:
        """Say how many of a pool's slots have no child now: nothing is claimed for them."""
        self._pools[pool].missing = slots

    def take(self, type_: str) -> None:
        """A job of this type was claimed."""
        one = self._types[type_]
        one.held += 1
        self._pools[one.info.pool].held += 1
        self.held += 1

    def release(self, type_: str, ran_ms: int | None) -> None:
        """A job of this type is not held any more; it ran for so long, or not at all (None)."""
        one = self._types[type_]
        one.held -= 1
        if ran_ms is not None:
            one.ended += 1
            one.run_s += _WEIGHT * (ran_ms / 1000 - one.run_s)
        self._pools[one.info.pool].held -= 1
        self.held -= 1

    @property
    def complete(self) -> int:
        """How many types there are: with fewer demands some type has no room."""
        return len(self._types)

    def measured(self, round_trip_s: float, now_s: float, asked: Collection[str]) -> None:
        """A claim of these types took `round_trip_s`; `now_s` is when it was answered, monotonic."""
        self._round_trip_s += _WEIGHT * (round_trip_s - self._round_trip_s)
        for name in asked:
            one = self._types[name]
            one.rate += _WEIGHT * (one.ended / max(0.001, now_s - one.since) - one.rate)
            one.ended, one.since = 0, now_s

    def _ahead(self, one: _Type) -> int:
        """Return how many jobs of a type start within `ROUND_TRIPS` beside those that there are slots for."""
        # A child would start all that it has, so a type with a bound here is not fetched ahead either.
        if one.info.limited or one.info.concurrency is not None:
            return 0
        span_s = max(LEAST_S, self._round_trip_s * ROUND_TRIPS)
        ahead = min(MOST_AHEAD, one.rate * span_s)
        if one.run_s > QUICK_S:
            # Two slow jobs that end together look like a fast type for a moment.
            ahead = min(ahead, self._pools[one.info.pool].concurrency * span_s / one.run_s)
        return int(ahead)

    def demands(self, unsettled: int) -> tuple[dict[str, Demand], list[int]]:
        """Return what to claim of each type now, and the free slots of each pool.

        Types that can take none are left out. `unsettled` jobs have ended here and are not written yet.
        """
        left = MOST_HELD - self.held - unsettled
        budgets = [pool.concurrency - pool.held - pool.missing for pool in self._pools.values()]
        demands: dict[str, Demand] = {}
        if left <= 0:
            return demands, budgets
        for name, one in self._types.items():
            info = one.info
            if not self._open.get((info.pool, info.isolation), False):
                continue
            ahead = self._ahead(one)
            count = min(MOST_A_CLAIM, left)
            if info.concurrency is not None:
                count = min(count, info.concurrency - one.held)
            index = self._index[info.pool]
            count = min(count, budgets[index] + ahead)
            if count > 0:
                demands[name] = Demand(count, ahead, index)
        return demands, budgets
