"""How many jobs of which type this node may take now.

A type may have as many jobs here as its pool has room, and, where it starts quickly, as many more as it
starts within about two round trips of a claim: that keeps children fed without holding back jobs from
other nodes. Slow types and limited ones are never fetched ahead.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from taskd.model.jobtype import TypeInfo
from taskd.store.leases import Demand

ROUND_TRIPS = 2.0
MOST_AHEAD = 2000
"""Jobs of one type that are fetched ahead at most, whatever the rate."""
MOST_A_CLAIM = 1000
"""Jobs of one type that one claim statement asks for at most."""
MOST_HELD = 6000
"""Jobs that this node holds at most, unsettled ones included: bounds memory while Postgres is away."""

_WEIGHT = 0.3
"""Of the newest measurement in the moving averages."""
_SPAN_S = 0.1
"""A rate is measured over this long at least: two slow jobs that end together are no fast type."""


@dataclass(slots=True)
class _Type:
    info: TypeInfo
    held: int = 0
    """Handed out or waiting for a child here."""
    ended: int = 0
    """Runs that ended since `since`."""
    since: float = 0.0
    rate: float = 0.0
    """Runs that end per second, averaged."""


@dataclass(slots=True)
class _Pool:
    concurrency: int
    held: int = 0


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

    def take(self, type_: str) -> None:
        """A job of this type was claimed."""
        one = self._types[type_]
        one.held += 1
        self._pools[one.info.pool].held += 1
        self.held += 1

    def release(self, type_: str, *, ran: bool = True) -> None:
        """A job of this type is not held any more; `ran` False when it was handed back unrun."""
        one = self._types[type_]
        one.held -= 1
        one.ended += ran
        self._pools[one.info.pool].held -= 1
        self.held -= 1

    @property
    def round_trip_s(self) -> float:
        """How long a claim takes, averaged."""
        return self._round_trip_s

    @property
    def complete(self) -> int:
        """How many types there are: with fewer demands some type has no room."""
        return len(self._types)

    def measured(self, round_trip_s: float, now_s: float) -> None:
        """A claim took `round_trip_s` and was answered at `now_s`, on a clock that only grows."""
        self._round_trip_s += _WEIGHT * (round_trip_s - self._round_trip_s)
        for one in self._types.values():
            span_s = now_s - one.since
            if span_s >= _SPAN_S:
                one.rate += _WEIGHT * (one.ended / span_s - one.rate)
                one.ended, one.since = 0, now_s

    def demands(self, unsettled: int) -> tuple[dict[str, Demand], list[int]]:
        """Return what to claim of each type now, and the free slots of each pool.

        Types that can take none are left out. `unsettled` jobs have ended here and are not written yet.
        """
        left = MOST_HELD - self.held - unsettled
        budgets = [pool.concurrency - pool.held for pool in self._pools.values()]
        demands: dict[str, Demand] = {}
        if left <= 0:
            return demands, budgets
        for name, one in self._types.items():
            info = one.info
            if not self._open.get((info.pool, info.isolation), False):
                continue
            ahead = 0
            # A child would start all that it has, so a type with a bound here is not fetched ahead either.
            if not info.limited and info.concurrency is None:
                ahead = min(MOST_AHEAD, int(one.rate * self._round_trip_s * ROUND_TRIPS))
            count = min(MOST_A_CLAIM, left)
            if info.concurrency is not None:
                count = min(count, info.concurrency - one.held)
            index = self._index[info.pool]
            count = min(count, budgets[index] + ahead)
            if count > 0:
                demands[name] = Demand(count, ahead, index)
        return demands, budgets
