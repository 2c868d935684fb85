"""The lanes of this node's types, and where in each a claim starts to look.

A claim moves the *floor* of its lane to where it ended, so that no later claim walks over the dead
entries before it (somebody's open snapshot keeps them there for as long as it lives). A floor may pass a
row that another transaction held locked or had not committed yet. So once a second a *check* looks
between the *safe* position and the floor: what is unclaimed there sets the floor back. Each check also
leaves a *mark*: where the floors were, and which transactions were under way. Once these have ended, and
a look after that has found nothing, the marked position is safe. A check thus reads a few seconds of
traffic, whatever a snapshot holds back.

A transaction that stays open for long (somebody's nightly batch) must not hold all this up: after
`PATIENCE` the safe position passes it, where it stood is kept, and looked at again from there when that
transaction has ended.

Sound because no statement writes a `run_at` that lies before its own start (`taskd.moment` in the
migration): a transaction that is not in the mark takes its times after the mark's, so it can't put a row
before it. `SLACK` covers small steps of the server's clock; a claim notices larger ones (`forget`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from taskd.store.leases import START, Horizon, Lane, Position

SLACK = timedelta(seconds=1)
PATIENCE = timedelta(seconds=2)
"""How long a mark waits for its transactions."""

_EARLIEST = datetime.min.replace(tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class _Mark:
    """Where the floors were at a moment, at most, and the transactions that were under way then."""

    running: frozenset[int]
    at: datetime
    floors: dict[Lane, Position]


class Lanes:
    """Floors by lane; owned by the claimer, checked by the heart."""

    def __init__(self) -> None:
        self._by_type: dict[str, list[int]] = {}
        self._floors: dict[Lane, Position] = {}
        self._safe: dict[Lane, Position] = {}
        self._mark: _Mark | None = None
        self._passed: dict[int, dict[Lane, Position]] = {}
        """Where each lane was safe when the safe position passed a transaction that was still open."""
        self._asked: dict[Lane, Position] = {}
        """Where the floors were when the check that is under way began."""
        self._back: dict[Lane, Position] = {}
        """Floors that were set back since the claim that is under way began."""
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
        """Return what a claim begins with: the lanes of `types`, those of a type side by side and best
        first, and their floors.
        """
        self._back.clear()
        lanes = [(type_, priority) for type_ in types for priority in self._by_type.get(type_, ())]
        return lanes, [self._floors[lane] for lane in lanes]

    def move(self, floors: dict[Lane, Position]) -> None:
        """A claim ended here; a floor that was set back meanwhile stays there."""
        self._floors.update(floors | self._back)
        self._moved = self._moved or bool(floors)

    def spans(self) -> dict[Lane, tuple[Position, Position]]:
        """Return what a check that begins now looks at: from the safe position to the floor, where they
        differ.
        """
        self._asked = dict(self._floors)
        return {
            lane: (self._safe[lane], floor)
            for lane, floor in self._floors.items()
            if self._safe[lane] != floor
        }

    @property
    def idle(self) -> bool:
        """Whether a check has nothing to do: all floors are safe, and no transaction was passed."""
        return not self._moved and not self._passed and self._safe == self._floors

    def checked(self, found: Mapping[Lane, Position], horizon: Horizon) -> bool:
        """Take the answer of a check of `spans()`; returns whether unclaimed rows lie before a floor."""
        self._floors.update(found)
        self._back.update(found)
        mark = self._mark
        open_ = frozenset() if mark is None else mark.running & horizon.running
        if mark is None:
            self._leave_mark(horizon)
        elif open_ <= self._passed.keys() or horizon.at - mark.at >= PATIENCE:
            for number in open_:
                was = self._passed.setdefault(number, {})
                for lane in mark.floors:
                    was[lane] = min(was.get(lane, self._safe[lane]), self._safe[lane], key=_order)
            for lane, floor in mark.floors.items():
                looked = self._asked.get(lane, START)
                self._safe[lane] = min(floor, looked, found.get(lane, floor), key=_order)
            self._leave_mark(horizon)
        for number in self._passed.keys() - horizon.running:
            for lane, position in self._passed.pop(number).items():
                self._safe[lane] = min(position, self._safe[lane], key=_order)
        return bool(found)

    def _leave_mark(self, horizon: Horizon) -> None:
        self._moved = False
        ceiling = Position((horizon.at - SLACK).isoformat(), START.id)
        floors = {lane: min(floor, ceiling, key=_order) for lane, floor in self._floors.items()}
        self._mark = _Mark(horizon.running, horizon.at, floors)

    def forget(self) -> None:
        """Look everywhere from the start again: after a gap in which anything may have happened."""
        for lane in self._floors:
            self._floors[lane] = START
            self._safe[lane] = START
        self._mark = None
        self._passed = {}
        self._back = {}


def _order(position: Position) -> tuple[datetime, str]:
    at = _EARLIEST if position == START else datetime.fromisoformat(position.at)
    return at, position.id
