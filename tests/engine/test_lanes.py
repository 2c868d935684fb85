"""Floors of lanes: whatever commits late, is held by others or stays open, no job is passed for ever."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from uuid import UUID

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from taskd.engine.lanes import PATIENCE, Lanes
from taskd.store.leases import START, Horizon, Lane, Position

MAIL: Lane = ("mail", 0)
NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


@dataclass
class Row:
    """A waiting job: who inserted it, and who holds it locked, by their transactions."""

    at: datetime
    number: int
    writer: int
    locked_by: int | None = None
    claimed: bool = False

    @property
    def position(self) -> Position:
        return Position(self.at.isoformat(), str(UUID(int=self.number)))

    @property
    def place(self) -> tuple[datetime, int]:
        return self.at, self.number


class Table:
    """A queue of one lane as Postgres would show it."""

    def __init__(self) -> None:
        self.now = NOON
        self.numbers = 0
        self.open: set[int] = set()
        self.aborted: set[int] = set()
        self.rows: list[Row] = []

    def begin(self) -> int:
        self.numbers += 1
        self.open.add(self.numbers)
        return self.numbers

    def end(self, number: int, *, commit: bool) -> None:
        self.open.discard(number)
        if not commit:
            self.aborted.add(number)
        for row in self.rows:
            if row.locked_by == number:
                row.locked_by, row.claimed = None, commit

    def insert(self, writer: int) -> Row:
        self.numbers += 1
        row = Row(self.now, self.numbers, writer)
        self.rows.append(row)
        return row

    def visible(self) -> Iterator[Row]:
        hidden = self.open | self.aborted
        return (row for row in sorted(self.rows, key=lambda row: row.place) if row.writer not in hidden)

    def claim(self, floor: Position, most: int) -> dict[Lane, Position]:
        """Take rows from the floor on; return the new floor as a haul does."""
        took = [
            row
            for row in self.visible()
            if not row.claimed and row.locked_by is None and row.at <= self.now and _at_or_after(row, floor)
        ][:most]
        for row in took:
            row.claimed = True
        return {MAIL: took[-1].position} if took else {}

    def look(self, spans: dict[Lane, tuple[Position, Position]]) -> dict[Lane, Position]:
        """Return the first unclaimed row of the span; one that is locked is not claimed yet."""
        if MAIL not in spans:
            return {}
        first, last = spans[MAIL]
        for row in self.visible():
            if not row.claimed and _at_or_after(row, first) and not _after(row, last):
                return {MAIL: row.position}
        return {}

    def horizon(self) -> Horizon:
        return Horizon(frozenset(self.open), self.now)


def _at_or_after(row: Row, position: Position) -> bool:
    return position == START or row.place >= _place(position)


def _after(row: Row, position: Position) -> bool:
    return position == START or row.place > _place(position)


def _place(position: Position) -> tuple[datetime, int]:
    return datetime.fromisoformat(position.at), UUID(position.id).int


def check(table: Table, lanes: Lanes) -> bool:
    spans = lanes.spans()
    horizon = table.horizon()
    return lanes.checked(table.look(spans), horizon)


def claim(table: Table, lanes: Lanes, most: int = 1000) -> None:
    _, [floor] = lanes.of(["mail"])
    lanes.move(table.claim(floor, most))


def claimed_in_time(table: Table, lanes: Lanes, row: Row, *, checks: int = 2) -> bool:
    """Whether the row is claimed within so many checks, a second apart, while nothing else happens."""
    for _ in range(checks):
        table.now += timedelta(seconds=1)
        check(table, lanes)
        claim(table, lanes)
    return row.claimed


def fresh() -> tuple[Table, Lanes]:
    lanes = Lanes()
    lanes.add(MAIL)
    return Table(), lanes


class World(RuleBasedStateMachine):
    """Anything may happen in any order, also in the middle of a claim and of a check; in the end every
    committed row has been claimed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.table, self.lanes = fresh()
        self.claiming: tuple[Position, int, dict[Lane, Position] | None] | None = None
        self.checking: _Check | None = None

    @rule(step=st.sampled_from([1, 400, 1100, 2500]))
    def time_goes_on(self, step: int) -> None:
        self.table.now += timedelta(milliseconds=step)

    @rule(times=st.integers(min_value=1, max_value=3))
    def insert_and_commit(self, times: int) -> None:
        for _ in range(times):
            number = self.table.begin()
            self.table.insert(number)
            self.table.end(number, commit=True)

    @precondition(lambda self: len(self.table.open) < 3)
    @rule()
    def insert_and_leave_open(self) -> None:
        self.table.insert(self.table.begin())

    @precondition(lambda self: self.table.open)
    @rule(oldest=st.booleans(), commit=st.booleans())
    def end(self, oldest: bool, commit: bool) -> None:
        self.table.end((min if oldest else max)(self.table.open), commit=commit)

    @precondition(lambda self: len(self.table.open) < 3)
    @rule()
    def another_node_claims_the_first(self) -> None:
        for row in self.table.visible():
            if not row.claimed and row.locked_by is None:
                row.locked_by = self.table.begin()
                return

    @rule(most=st.sampled_from([1, 2, 1000]))
    def claim(self, most: int) -> None:
        """Take the next step of a claim: sent, done in the server, answered."""
        if self.claiming is None:
            _, [floor] = self.lanes.of(["mail"])
            self.claiming = floor, most, None
        elif self.claiming[2] is None:
            floor, most, _ = self.claiming
            self.claiming = floor, most, self.table.claim(floor, most)
        else:
            self.lanes.move(self.claiming[2])
            self.claiming = None

    @rule()
    def check(self) -> None:
        """Take the next step of a check: sent, its horizon taken, its look done, answered."""
        if self.checking is None:
            if not self.lanes.idle:
                self.checking = _Check(self.lanes.spans())
        elif self.checking.horizon is None:
            self.checking.horizon = self.table.horizon()
        elif self.checking.found is None:
            self.checking.found = self.table.look(self.checking.spans)
        else:
            self.lanes.checked(self.checking.found, self.checking.horizon)
            self.checking = None

    @rule(most=st.sampled_from([1, 1000]))
    def a_second_of_work(self, most: int) -> None:
        """Have what is under way end, then make a whole check and a whole claim."""
        while self.claiming is not None:
            self.claim(most)
        while self.checking is not None:
            self.check()
        self.table.now += timedelta(seconds=1)
        if not self.lanes.idle:
            check(self.table, self.lanes)
        claim(self.table, self.lanes, most)

    def teardown(self) -> None:
        for number in sorted(self.table.open):
            self.table.end(number, commit=True)
        for _ in range(8):
            self.a_second_of_work(1000)

        assert [row for row in self.table.visible() if not row.claimed] == []
        assert self.lanes.idle


@dataclass
class _Check:
    spans: dict[Lane, tuple[Position, Position]]
    horizon: Horizon | None = None
    found: dict[Lane, Position] | None = None


TestWorld = World.TestCase
TestWorld.settings = settings(max_examples=400, stateful_step_count=50, deadline=None)


def test_a_new_lane_is_looked_at_from_its_start() -> None:
    _, lanes = fresh()

    assert lanes.of(["mail"]) == ([MAIL], [START])
    assert lanes.idle


def test_lanes_of_a_type_stand_side_by_side_best_first() -> None:
    lanes = Lanes()
    for lane in [("b", 0), ("a", -1), ("a", 9), ("b", 3), ("a", 0), ("a", 9)]:
        lanes.add(lane)

    named, _ = lanes.of(["b", "a", "unknown"])

    assert named == [("b", 3), ("b", 0), ("a", 9), ("a", 0), ("a", -1)]


def test_a_row_that_commits_late_under_steady_traffic_is_found_by_the_next_check() -> None:
    table, lanes = fresh()
    slow = table.begin()
    late = table.insert(slow)
    for _ in range(50):
        table.now += timedelta(milliseconds=20)
        commit_one(table)
        claim(table, lanes)
    table.end(slow, commit=True)

    assert check(table, lanes)
    claim(table, lanes)
    assert late.claimed


def test_a_transaction_that_stays_open_hides_nobody_elses_rows() -> None:
    table, lanes = fresh()
    batch = table.begin()
    own = table.insert(batch)
    for _ in range(60):
        table.now += timedelta(seconds=1)
        slow = table.begin()
        late = table.insert(slow)
        commit_one(table)
        claim(table, lanes)
        table.end(slow, commit=True)
        assert claimed_in_time(table, lanes, late)

    table.end(batch, commit=True)

    assert claimed_in_time(table, lanes, own, checks=3)


def test_checks_read_a_few_seconds_of_traffic_however_long_a_transaction_is_open() -> None:
    table, lanes = fresh()
    table.begin()
    for _ in range(100):
        table.now += timedelta(seconds=1)
        commit_one(table)
        claim(table, lanes)
        check(table, lanes)

    [(first, last)] = lanes.spans().values()

    assert _place(last)[0] - _place(first)[0] <= PATIENCE + timedelta(seconds=3)


def test_checks_end_when_nothing_moves() -> None:
    table, lanes = fresh()
    commit_one(table)
    claim(table, lanes)

    for _ in range(4):
        table.now += timedelta(seconds=1)
        check(table, lanes)

    assert lanes.idle


def test_forgetting_looks_everywhere_again() -> None:
    table, lanes = fresh()
    commit_one(table)
    claim(table, lanes)

    lanes.forget()

    assert lanes.of(["mail"]) == ([MAIL], [START])


def test_a_floor_that_a_check_sets_back_is_not_lost_to_the_claim_that_is_under_way() -> None:
    table, lanes = fresh()
    slow = table.begin()
    late = table.insert(slow)
    commit_one(table)
    claim(table, lanes)
    table.end(slow, commit=True)

    # Busy nodes have a claim under way at every moment.
    _, [floor] = lanes.of(["mail"])
    commit_one(table)
    moved = table.claim(floor, 1000)
    check(table, lanes)
    lanes.move(moved)

    claim(table, lanes)
    assert late.claimed


def test_what_began_after_the_horizon_of_a_check_is_not_passed_by_it() -> None:
    table, lanes = fresh()
    commit_one(table)
    claim(table, lanes)
    spans, horizon = lanes.spans(), table.horizon()
    table.now += timedelta(seconds=1)
    slow = table.begin()
    late = table.insert(slow)
    table.now += timedelta(seconds=1)
    commit_one(table)
    claim(table, lanes)
    lanes.checked({}, horizon)
    assert MAIL in spans

    for _ in range(4):
        check(table, lanes)
    table.end(slow, commit=True)

    assert claimed_in_time(table, lanes, late)


def commit_one(table: Table) -> None:
    number = table.begin()
    table.insert(number)
    table.end(number, commit=True)
