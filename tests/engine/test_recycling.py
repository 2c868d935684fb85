"""What becomes of a child process that takes too much or has done enough, and of the jobs beside it."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
from contextlib import suppress
from pathlib import Path
from uuid import UUID

import msgspec

from taskd.engine.children import PoolSettings
from taskd.model.job import Job
from taskd.model.state import Cause
from tests.engine.node import Node, appears, eventually, running

LIMIT = 192 << 20
"""Bytes; a child with nothing in it has a quarter of that."""
QUICK: dict[str, dict[str, object]] = {"quick": {"handler": "gate"}}
ONCE: dict[str, object] = {"restartable": False}


def payload(**members: object) -> str:
    return msgspec.json.encode(members).decode()


def pid_of(job: Job) -> int:
    return int(msgspec.json.decode(job.result or "")["pid"])


def causes(job: Job) -> list[Cause]:
    return [run.cause for run in job.history]


def gone(pid: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return False
    return True


async def opened(node: Node, tmp_path: Path) -> Job:
    """Run a job that ends at once and tells its process."""
    (tmp_path / "open").touch()
    return await node.until(await node.add("quick", payload(path=str(tmp_path / "open"))))


# -- max_memory of a type ----------------------------------------------------------------------------------


async def test_a_job_beyond_its_max_memory_ends_as_oom_and_no_other_process_does(
    database_url: str, tmp_path: Path
) -> None:
    types: dict[str, dict[str, object]] = {"solo_burst": {"max_memory": LIMIT}}
    async with running(database_url, types=types) as node:
        path = str(tmp_path / "go")
        beside = [await node.add("gate", payload(path=path)), await node.add("solo_gate", payload(path=path))]
        before = {int(pid) for pid in await appears(tmp_path / "go.started", lines=2)}

        greedy = await node.until(await node.add("solo_burst", max_attempts=2))
        (tmp_path / "go").touch()
        others = [await node.until(job_id) for job_id in beside]

    assert (greedy.status, greedy.attempts, causes(greedy)) == ("failed", 2, [Cause.OOM, Cause.OOM])
    assert "max_memory" in (greedy.error_message or "")
    assert [run.signal for run in greedy.history] == [signal.SIGKILL] * 2
    # The kernel counts the peak of a child from that of who forked it: of a test run that has taken more by
    # now than the limit it can't be told.
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert all((run.max_rss or 0) > LIMIT or (run.max_rss is None and own > LIMIT) for run in greedy.history)
    assert [(job.status, job.attempts, job.history) for job in others] == [("completed", 1, ())] * 2
    assert {pid_of(job) for job in others} == before


async def test_three_deaths_by_memory_fail_a_job_whatever_its_attempts(database_url: str) -> None:
    types: dict[str, dict[str, object]] = {"solo_burst": {"max_memory": LIMIT}}
    async with running(database_url, types=types) as node:
        greedy = await node.until(await node.add("solo_burst", max_attempts=50))

    assert (greedy.status, causes(greedy)) == ("failed", [Cause.OOM] * 3)


async def test_a_shared_process_beyond_max_memory_blames_nobody_and_finds_the_culprit_alone(
    database_url: str, tmp_path: Path
) -> None:
    types: dict[str, dict[str, object]] = {"burst": {"max_memory": LIMIT}}
    async with running(database_url, types=types) as node:
        path = str(tmp_path / "never")
        beside = [await node.add("gate", payload(path=path)) for _ in range(3)]
        await appears(tmp_path / "never.started", lines=3)
        culprit = await node.add("burst", payload(path=str(tmp_path / "go")), max_attempts=50)
        await appears(tmp_path / "go.started")
        (tmp_path / "go").touch()

        found = await node.until(culprit)
        (tmp_path / "never").touch()
        others = [await node.until(job_id) for job_id in beside]

    assert (found.status, found.attempts) == ("failed", 3)
    assert causes(found) == [Cause.INTERRUPTED, *[Cause.OOM] * 3]
    assert [(job.status, job.attempts, causes(job)) for job in others] == [
        ("completed", 1, [Cause.INTERRUPTED])
    ] * 3


# -- max_jobs and max_memory of children -------------------------------------------------------------------


async def test_a_child_is_replaced_after_its_jobs_and_the_other_one_goes_on(
    database_url: str, tmp_path: Path
) -> None:
    pools = {"default": PoolSettings(processes=2, concurrency=2)}
    async with running(database_url, types=QUICK, pools=pools, child_max_jobs=5) as node:
        held = await node.add("gate", payload(path=str(tmp_path / "go")))
        [pid] = await appears(tmp_path / "go.started")

        done = [await opened(node, tmp_path) for _ in range(23)]
        (tmp_path / "go").touch()
        last = await node.until(held)
        put_back = node.daemon._metrics.get("taskd_put_back_total")

    pids = [pid_of(job) for job in done]
    assert {pids.count(one) for one in set(pids)} <= {5, 3}, "each child did five jobs, the last one the rest"
    assert int(pid) not in pids
    assert all((job.status, job.attempts, job.history) == ("completed", 1, ()) for job in [*done, last])
    assert pid_of(last) == int(pid)
    assert put_back == 0


async def test_a_long_job_of_a_child_that_leaves_takes_no_slots_from_others(
    database_url: str, tmp_path: Path
) -> None:
    pools = {"default": PoolSettings(processes=2, concurrency=4)}
    async with running(database_url, types=QUICK, pools=pools, child_max_jobs=5) as node:
        long = [await node.add("gate", payload(path=str(tmp_path / "go")))]
        await appears(tmp_path / "go.started")
        for _ in range(20):
            await opened(node, tmp_path)

        long += [await node.add("gate", payload(path=str(tmp_path / "go"))) for _ in range(3)]
        await appears(tmp_path / "go.started", lines=4)
        (tmp_path / "go").touch()
        done = [await node.until(job_id) for job_id in long]

    assert all((job.status, job.attempts, job.history) == ("completed", 1, ()) for job in done)


async def test_nothing_waits_behind_a_long_job_while_a_dead_child_is_started_again(
    database_url: str, tmp_path: Path
) -> None:
    pools = {"default": PoolSettings(processes=2, concurrency=2)}
    async with running(database_url, pools=pools) as node:
        held = await node.add("gate", payload(path=str(tmp_path / "never")))
        await appears(tmp_path / "never.started")
        await node.until(await node.add("die", max_attempts=1))

        (tmp_path / "open").touch()
        for _ in range(5):  # of the same type as the one that is held
            quick = await node.until(await node.add("gate", payload(path=str(tmp_path / "open"))), within_s=5)
            assert (quick.status, quick.attempts) == ("completed", 1)
        put_back = node.daemon._metrics.get("taskd_put_back_total")
        assert (await node.job(held)).status == "processing"

    assert put_back <= 10, "nor is it claimed and put back over and over"


async def test_a_child_that_has_grown_is_replaced_after_its_jobs_and_the_other_one_goes_on(
    database_url: str, tmp_path: Path
) -> None:
    pools = {"default": PoolSettings(processes=2, concurrency=4)}
    async with running(database_url, types=QUICK, pools=pools, child_max_memory=LIMIT) as node:
        path = str(tmp_path / "go")
        held = [await node.add("gate", payload(path=path)) for _ in range(2)]
        before = [int(pid) for pid in await appears(tmp_path / "go.started", lines=2)]
        assert len(set(before)) == 2, "one job in each child"

        (tmp_path / "swell").touch()
        swollen = await node.until(await node.add("swell", payload(path=str(tmp_path / "swell"), size=LIMIT)))
        grown = pid_of(swollen)
        kept = next(pid for pid in before if pid != grown)
        fresh = [await opened(node, tmp_path) for _ in range(10)]
        still = not gone(grown)
        (tmp_path / "go").touch()
        others = [await node.until(job_id) for job_id in held]
        await eventually(lambda: _gone(grown), what=lambda: "the child that has grown does not end")
        after = {pid_of(await opened(node, tmp_path)) for _ in range(10)}

    assert still, "it had a job to end"
    assert [(job.status, job.attempts, job.history) for job in [*others, *fresh]] == [
        ("completed", 1, ())
    ] * 12
    assert sorted(pid_of(job) for job in others) == sorted(before)
    assert grown not in {*after, *(pid_of(job) for job in fresh[-5:])}
    assert kept in {*after, *(pid_of(job) for job in fresh)}


async def _gone(pid: int) -> bool:
    return gone(pid)


# -- restartable: false ------------------------------------------------------------------------------------


async def test_a_job_that_must_not_run_twice_fails_when_its_process_dies(database_url: str) -> None:
    async with running(database_url, types={"die": ONCE}) as node:
        job = await node.until(await node.add("die", payload(code=9), max_attempts=5))

    assert (job.status, job.attempts, causes(job)) == ("failed", 1, [Cause.CRASHED])
    assert (job.error_message or "").startswith("outcome unknown: ")


async def test_a_job_that_must_not_run_twice_fails_when_a_neighbour_takes_its_process_down(
    database_url: str, tmp_path: Path
) -> None:
    async with running(database_url, types={"gate": ONCE}) as node:
        innocent = await node.add("gate", payload(path=str(tmp_path / "never")))
        await appears(tmp_path / "never.started")
        await node.add("die", payload(path=str(tmp_path / "go")), max_attempts=1)
        (tmp_path / "go").touch()
        job = await node.until(innocent)

    assert (job.status, causes(job)) == ("failed", [Cause.INTERRUPTED])
    assert (job.error_message or "").startswith("outcome unknown: ")
    assert len((tmp_path / "never.started").read_text().splitlines()) == 1


async def test_a_job_that_must_not_run_twice_fails_when_a_drain_cuts_it_short(
    database_url: str, tmp_path: Path
) -> None:
    async with running(database_url, types={"gate": ONCE}) as node:
        cut = await node.add("gate", payload(path=str(tmp_path / "never")))
        await appears(tmp_path / "never.started")
        waits: list[UUID] = []
        node.signals.drain()
        waits.append(await node.add("gate", payload(path=str(tmp_path / "never"))))
        node.signals.drain()
        await node.ended()
        job, never_started = await asyncio.gather(node.job(cut), node.job(waits[0]))

    assert (job.status, causes(job)) == ("failed", [Cause.INTERRUPTED])
    assert (job.error_message or "").startswith("outcome unknown: ")
    assert (never_started.status, never_started.attempts) == ("pending", 0), "what has not run may run"
