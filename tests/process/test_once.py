from __future__ import annotations

import asyncio

from taskd.process.family import Family
from taskd.process.once import run_once

from .conftest import DEADLINE_S, Outlet, is_running, open_descriptors, shell


async def test_a_program_gets_its_input_and_gives_its_output(family: Family) -> None:
    before = open_descriptors()
    data = b"x" * 200_000  # more than a pipe holds

    ran = await run_once(family, shell("cat; echo oh >&2; exit 4"), data, limit=2**20, deadline_s=DEADLINE_S)

    assert (ran.exit.code, ran.stdout, ran.stderr, ran.timed_out) == (4, data, b"oh\n", False)
    assert open_descriptors() == before


async def test_output_is_cut_at_the_limit(family: Family) -> None:
    ran = await run_once(family, shell("seq 100000"), b"", limit=5, deadline_s=DEADLINE_S)

    assert ran.stdout == b"1\n2\n3"


async def test_a_program_that_hangs_is_killed(family: Family) -> None:
    ran = await run_once(family, shell("echo before; sleep 1000"), b"", limit=99, deadline_s=0.05)

    assert (ran.timed_out, str(ran.exit)) == (True, "killed by SIGKILL")


async def test_a_cancelled_run_kills_the_program(family: Family, outlet: Outlet) -> None:
    spec = shell(f"echo $$ > /proc/self/fd/{outlet.write}; exec sleep 1000", pass_fds=[outlet.write])
    running = asyncio.create_task(run_once(family, spec, b"", limit=99, deadline_s=DEADLINE_S))
    await asyncio.wait({running}, timeout=0)
    pid = int(outlet.line())
    (member,) = family.members.values()

    running.cancel()
    await member.wait()

    assert not is_running(pid)
