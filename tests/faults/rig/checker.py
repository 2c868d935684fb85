"""The invariants of the fault plan, over the database, the driver's ledger and the ledger of the jobs.

I1 to I5 hold after a case, i6 to i9 at any moment of it, i10 over it. Each function returns what it found
wrong, as sentences; nothing found is nothing wrong. Names as in the fault plan (docs/faults.md).
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tests.faults.rig.driver import Tally
from tests.faults.rig.keeper import Resources

Ask = Callable[[str], Sequence[tuple[Any, ...]]]
"""Runs one statement and returns its rows."""

UNCOUNTED = frozenset({"interrupted", "snoozed", "invalid_payload"})
"""Causes of runs that use up no attempt."""
RETRIED = "retried"
"""Cause of the entry that a retry by hand writes: with the claim of the run that had completed, if any."""
MOST_SHOWN = 5


@dataclass(frozen=True, slots=True)
class LedgerRun:
    """One run as its own process wrote it down. Times on the boot clock and as Unix time, in seconds."""

    job_id: str
    attempt: int
    pid: int
    started: float
    started_at: float
    ended: float | None
    """None: it was stopped before its end."""


def read_ledger(path: Path) -> list[LedgerRun]:
    """Return the runs of a ledger in the order of their starts; a last line cut short is left out."""
    starts: dict[str, tuple[str, int, int, float, float]] = {}
    ends: dict[str, float] = {}
    text = path.read_text() if path.exists() else ""
    for line in text.splitlines():
        words = line.split()
        if len(words) != 7:
            continue
        what, job_id, attempt, pid, run, boot, wall = words
        if what == "start":
            starts[run] = (job_id, int(attempt), int(pid), float(boot), float(wall))
        else:
            ends[run] = float(boot)
    runs = [LedgerRun(*start, ends.get(run)) for run, start in starts.items()]
    return sorted(runs, key=lambda run: run.started)


class Entry(NamedTuple):
    """One entry of a job's history."""

    attempt: int
    cause: str
    ran: bool
    """It is about a run: it has a claim. None has what ended a waiting job, or a retry of a failed one."""


@dataclass(frozen=True, slots=True)
class Row:
    """What the database says of one job."""

    job_id: str
    number: int | None
    status: str
    """`waiting`, `processing`, a final status, or `nowhere` for a job that neither waits nor has ended."""
    attempts: int
    max_attempts: int
    history: tuple[Entry, ...] = ()
    """Runs that did not complete, what ended it while it waited, and retries by hand; oldest first."""

    @property
    def final(self) -> bool:
        """Whether it has ended."""
        return self.status in ("completed", "failed", "cancelled")

    @property
    def life(self) -> tuple[Entry, ...]:
        """The history since the last retry by hand: attempts are counted from there."""
        retries = [place for place, entry in enumerate(self.history) if entry.cause == RETRIED]
        return self.history[retries[-1] + 1 :] if retries else self.history


_ROWS = """
select j.id::text, (j.payload::jsonb ->> 'n')::integer,
    case when o.id is not null and q.id is not null then 'twice'
        when o.id is not null then o.status when q.claimed then 'processing'
        when q.id is not null then 'waiting' else 'nowhere' end,
    coalesce(o.attempts, q.attempts + q.claimed::integer, 0)::integer,
    coalesce(o.max_attempts, q.max_attempts, 0)::integer,
    coalesce((
        select array_agg(h.attempt || ' ' || h.cause || ' ' || (h.claim is not null) order by h.ended_at)
        from taskd.history as h where h.job_id = j.id), '{}')
from taskd.jobs as j
left join taskd.queue as q on q.id = j.id
left join taskd.outcomes as o on o.id = j.id
"""


def read_rows(ask: Ask) -> dict[str, Row]:
    """Return all jobs of the database by id."""
    rows = {}
    for job_id, number, status, attempts, most, history in ask(_ROWS):
        words = (entry.split() for entry in history)
        entries = tuple(Entry(int(attempt), cause, ran == "true") for attempt, cause, ran in words)
        rows[job_id] = Row(job_id, number, status, attempts, most, entries)
    return rows


@dataclass(frozen=True, slots=True)
class Findings:
    """What a check found. `violations` by invariant; `counts` for the report."""

    violations: dict[str, list[str]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return any(self.violations.values())

    def __str__(self) -> str:
        lines = [f"{key}={count}" for key, count in self.counts.items()]
        for name, found in self.violations.items():
            lines += [f"{name}: {text}" for text in found[:MOST_SHOWN]]
            if len(found) > MOST_SHOWN:
                lines.append(f"{name}: and {len(found) - MOST_SHOWN} more")
        return "\n".join(lines)


# -- after a case --------------------------------------------------------------------------------------


def absent(accepted: Mapping[int, str], rows: Mapping[str, Row]) -> list[str]:
    """I1: every accepted job is in the database, in one place."""
    gone = [
        f"accepted job {job_id} (number {n}) is absent"
        for n, job_id in accepted.items()
        if job_id not in rows
    ]
    return gone + [
        f"job {row.job_id} is {row.status}" for row in rows.values() if row.status in ("nowhere", "twice")
    ]


def unfinished(accepted: Mapping[int, str], rows: Mapping[str, Row]) -> list[str]:
    """I2: after quiet time every accepted job is finished."""
    return [
        f"accepted job {job_id} (number {n}) is {rows[job_id].status}"
        for n, job_id in accepted.items()
        if job_id in rows and not rows[job_id].final
    ]


def unasked(tally: Tally, rows: Mapping[str, Row]) -> list[str]:
    """I3: every job was submitted, by a request that was accepted or whose outcome is unknown, once."""
    found = []
    holders: dict[int, str] = {}
    for row in rows.values():
        if row.number is None or row.number not in tally.sent:
            found.append(f"job {row.job_id} was submitted by nobody")
        elif row.number in tally.refused:
            found.append(f"job {row.job_id} exists although its submit {row.number} was refused")
        elif tally.accepted.get(row.number, row.job_id) != row.job_id:
            found.append(f"job {row.job_id} is not the one that submit {row.number} was told of")
        elif row.number in holders:
            found.append(f"jobs {row.job_id} and {holders[row.number]} come from one submit {row.number}")
        if row.number is not None:
            holders[row.number] = row.job_id
    return found


def unexplained(rows: Mapping[str, Row], runs: Iterable[LedgerRun]) -> list[str]:
    """I4: no run that attempts and history don't account for; two at once only after a lost lease."""
    found = []
    by_job: defaultdict[str, list[LedgerRun]] = defaultdict(list)
    for run in runs:
        by_job[run.job_id].append(run)
    for job_id, of_job in by_job.items():
        row = rows.get(job_id)
        if row is None:
            found.append(f"job {job_id} ran and is not in the database")
            continue
        told = Counter(entry.attempt for entry in row.history if entry.ran)
        most = told.total() + (row.status in ("completed", "processing"))
        if len(of_job) > most:
            found.append(f"job {job_id} ran {len(of_job)} times, and {most} are told")
        for attempt, count in Counter(run.attempt for run in of_job).items():
            last = row.status in ("completed", "processing") and attempt == row.attempts
            if count > told[attempt] + last:
                found.append(
                    f"job {job_id}: {count} runs of attempt {attempt}, {told[attempt]} told, {row.status}"
                )
        found += _overlaps(of_job, row)
    for row in rows.values():
        counted = sum(entry.ran and entry.cause not in UNCOUNTED for entry in row.life)
        if row.attempts != counted + (row.status in ("completed", "processing")):
            found.append(f"job {row.job_id}: {row.attempts} attempts, {counted} told, {row.status}")
    return found


def _overlaps(of_job: Sequence[LedgerRun], row: Row) -> list[str]:
    lost = {entry.attempt for entry in row.history if entry.cause == "lease_expired"}
    return [
        f"job {earlier.job_id}: attempts {earlier.attempt} and {later.attempt} ran at once"
        for earlier, later in itertools.pairwise(of_job)
        if earlier.ended is not None and earlier.ended > later.started and earlier.attempt not in lost
    ]


def changed_after_end(ask: Ask) -> list[str]:
    """I5: one final move a job, and one more for each retry by hand.

    The trigger of the test schema notes each, and refuses other changes of a final row.
    """
    moves = ask(
        "select c.job_id::text, count(*), max(r.retries), max((o.id is not null)::integer) "
        "from public.terminal_changes as c "
        "left join taskd.outcomes as o on o.id = c.job_id "
        "cross join lateral (select count(*) as retries from taskd.history as h "
        f"    where h.job_id = c.job_id and h.cause = '{RETRIED}') as r "
        "group by c.job_id having count(*) <> max(r.retries) + max((o.id is not null)::integer)"
    )
    lost = ask(
        "select o.id::text from taskd.outcomes as o "
        "where not exists ("
        "    select from public.terminal_changes as c where c.job_id = o.id and c.status = o.status)"
    )
    return [
        f"job {job_id} ended {count} times, {retries} retried, and {'has' if there else 'is no longer'} ended"
        for job_id, count, retries, there in moves
    ] + [f"job {job_id} is not what it ended as" for (job_id,) in lost]


def after(tally: Tally, ask: Ask, ledger: Path) -> Findings:
    """Check I1 to I5, and i7 and i8, once all is quiet."""
    rows = read_rows(ask)
    runs = read_ledger(ledger)
    done = sum(row.final for row in rows.values())
    again = len(runs) - len({run.job_id for run in runs})
    return Findings(
        {
            "I1": absent(tally.accepted, rows),
            "I2": unfinished(tally.accepted, rows),
            "I3": unasked(tally, rows),
            "I4": unexplained(rows, runs),
            "I5": changed_after_end(ask),
            "i7": too_many_attempts(ask),
            "i8": loose_claims(ask),
            "answers": tally.wrong,
        },
        {
            "submitted": len(tally.sent),
            "accepted": len(tally.accepted),
            "unknown": len(tally.unknown),
            "finished": done,
            "runs": len(runs),
            "second_runs": again,
        },
    )


# -- at any moment -------------------------------------------------------------------------------------


def held_by_the_dead(ask: Ask, *, grace_s: float) -> list[str]:
    """i6: while another node lives, no row is processing for one whose lease ended `grace_s` ago.

    `grace_s` is sweep + 1 s; two sweeps more after an outage or the start of the rescuing node.
    """
    return [
        f"{count} jobs are processing for node {node}, whose lease ended {late:.1f} s ago"
        for node, count, late in ask(
            "select q.node, count(*), max(extract(epoch from clock_timestamp() - n.lease_until))::float8 "
            "from taskd.queue as q left join taskd.nodes as n on n.id = q.node "
            "where q.claimed "
            f"and (n.id is null or n.lease_until < clock_timestamp() - interval '{grace_s} s') "
            "and exists (select from taskd.nodes as o where o.id is distinct from q.node "
            "    and o.state = 'live' and o.lease_until > clock_timestamp() "
            f"    and o.started_at < clock_timestamp() - interval '{grace_s} s') "
            "group by q.node"
        )
    ]


def too_many_attempts(ask: Ask) -> list[str]:
    """i7: attempts never exceed the allowed ones."""
    return [
        f"job {job_id} has {attempts} attempts of {most}"
        for job_id, attempts, most in ask(
            "select id::text, attempts + claimed::integer, max_attempts from taskd.queue "
            "where attempts + claimed::integer > max_attempts "
            "union all select id::text, attempts, max_attempts from taskd.outcomes "
            "where attempts > max_attempts"
        )
    ]


def loose_claims(ask: Ask) -> list[str]:
    """i8: who is processing names node and claim; who waits has none, or that of its last failed run."""
    return [
        f"job {job_id}: {what}"
        for job_id, what in ask(
            "select id::text, 'processing without node and claim' from taskd.queue "
            "where claimed and (node is null or claim is null or started_at is null) "
            "union all select q.id::text, 'waits and keeps a claim' from taskd.queue as q "
            "where not q.claimed and (q.node is not null or q.claim is not null) and not exists ("
            "    select from taskd.history as h "
            "    where h.job_id = q.id and h.node = q.node and h.claim = q.claim)"
        )
    ]


def idle_transactions(ask: Ask) -> list[str]:
    """i9: no connection of taskd is idle in a transaction for more than 1 s."""
    return [
        f"{application} (process {pid}) is idle in a transaction"
        for application, pid in ask(
            "select application_name, pid from pg_stat_activity "
            "where application_name like 'taskd%' and state like 'idle in transaction%' "
            "and clock_timestamp() - state_change > interval '1 s'"
        )
    ]


def during(ask: Ask, *, grace_s: float) -> Findings:
    """Check i6 to i9 now."""
    return Findings(
        {
            "i6": held_by_the_dead(ask, grace_s=grace_s),
            "i7": too_many_attempts(ask),
            "i8": loose_claims(ask),
            "i9": idle_transactions(ask),
        }
    )


def grown(
    before: Mapping[int, Resources], after: Mapping[int, Resources], *, share: float = 0.1
) -> list[str]:
    """i10: processes that lived all the time hold no more than at the start, give or take a tenth.

    Descriptors get 4 more: a connection that is being made again holds two for a moment.
    """
    found = []
    for pid in before.keys() & after.keys():
        first, last = before[pid], after[pid]
        if last.rss > first.rss * (1 + share):
            found.append(f"process {pid} grew from {first.rss >> 20} to {last.rss >> 20} MiB")
        if last.descriptors > first.descriptors * (1 + share) + 4:
            found.append(f"process {pid} had {first.descriptors} descriptors and has {last.descriptors}")
    return found
