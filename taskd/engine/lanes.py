"""The lanes of this node's types, and where in each a claim starts to look.

A claim moves the *floor* of its lane to where it ended, so that no later claim walks over the dead
entries before it (somebody's open snapshot keeps them there for as long as it lives). A floor may pass a
row that another transaction held locked or had not committed yet. So once a second a *check* looks
between the *safe* floor and where the floors were at an earlier moment, as soon as every transaction of
that moment has ended: what is unclaimed there sets the floor back, else the safe floor moves up. A
check thus reads about a second of traffic, whatever a snapshot holds back.

Sound because no statement writes a `run_at` that lies before its own start: a transaction that starts
after the moment can't put a row before it (`SLACK` covers the time between reading the clock and
getting a transaction number).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from taskd.store.leases import START, Horizon, Lane, Position

SLACK = timedelta(seconds=1)


@dataclass(frozen=True, slots=True)
class _Mark:
    """Where the floors were at a moment, and the transactions that were under way then."""

    next: int
    floors: dict[Lane, Position]


class Lanes:
    """Floors by lane; owned by the claimer, checked by the heart."""

    def __init__(self) -> None:
        self._by_type: dict[str, list[int]] = {}
        self._floors: dict[Lane, Position] = {}
        self._safe: dict[Lane, Position] = {}
        self._mark: _Mark | None = None
        self._moved = False

    def add(self, lane: Lane) -> None:
        """Take a lane in; its first claim looks from the start."""
        if lane not in self._floors:
            type_, priority = lane
            priorities = self._by_type.setdefault(type_, [])
            priorities.append(priority)
            priorities.sort(reverse=True)
            self._floors[lane] = START
            self._safe[lane] = START

    def of(self, types: Collection[str]) -> tuple[list[Lane], list[Position]]:
        """Return the lanes of `types`, those of a type side by side and best first, and their floors."""
        lanes = [(type_, priority) for type_ in types for priority in self._by_type.get(type_, ())]
        return lanes, [self._floors[lane] for lane in lanes]

    def move(self, floors: Mapping[Lane, Position]) -> None:
        """A claim ended here."""
        self._floors.update(floors)
        self._moved = self._moved or bool(floors)

    def spans(self) -> dict[Lane, tuple[Position, Position]]:
        """Return what a check has to look at: from the safe floor to the marked one, per lane that moved."""
        if self._mark is None:
            return {}
        return {
            lane: (self._safe[lane], floor)
            for lane, floor in self._mark.floors.items()
            if self._safe[lane] != floor
        }

    @property
    def idle(self) -> bool:
        """Whether a check has nothing to do: no claim has found anything since the last full one."""
        return not self._moved and not self.spans()

    def checked(self, found: Mapping[Lane, Position], horizon: Horizon) -> bool:
        """Take the answer of a check; returns whether unclaimed rows lie before a floor.

        Until all transactions of the mark have ended nothing moves up; floors go back at once.
        """
        for lane, position in found.items():
            self._floors[lane] = position
        if self._mark is None:
            self._set_mark(horizon)
        elif horizon.oldest >= self._mark.next:
            for lane, floor in self._mark.floors.items():
                self._safe[lane] = found.get(lane, floor)
            self._set_mark(horizon)
        return bool(found)

    def _set_mark(self, horizon: Horizon) -> None:
        self._moved = False
        ceiling = horizon.at - SLACK
        self._mark = _Mark(
            horizon.next,
            {lane: floor for lane, floor in self._floors.items() if _before(floor, ceiling)},
        )

    def forget(self) -> None:
        """Look everywhere from the start again: after a gap in which anything may have happened."""
        for lane in self._floors:
            self._floors[lane] = START
            self._safe[lane] = START
        self._mark = None


def _before(floor: Position, ceiling: datetime) -> bool:
    return floor == START or datetime.fromisoformat(floor.at) <= ceiling
