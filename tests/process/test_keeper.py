from __future__ import annotations

import asyncio
import logging

import pytest

from taskd.process.family import Exit, Family, Member, Spec
from taskd.process.keeper import Keeper, Pace

from .conftest import DEADLINE_S, Outlet, shell

AT_ONCE = Pace(base_s=0.0, cap_s=0.0)
NEVER = Pace(base_s=10**6, cap_s=10**6)


@pytest.mark.parametrize(
    ("quick_deaths", "lived_s", "wait_s"),
    [
        pytest.param(0, 60.0, 0.0, id="a long life is followed at once"),
        pytest.param(0, 0.25, 0.75, id="starts are a second apart, however well it ended"),
        pytest.param(1, 0.0, 1.0, id="the first quick death waits a second"),
        pytest.param(2, 0.0, 2.0, id="the second twice that"),
        pytest.param(5, 0.0, 16.0, id="doubling"),
        pytest.param(6, 0.0, 30.0, id="never above the cap"),
        pytest.param(10**6, 0.0, 30.0, id="no float overflow"),
    ],
)
def test_pace(quick_deaths: int, lived_s: float, wait_s: float) -> None:
    assert Pace().wait_s(quick_deaths, lived_s) == wait_s


class Script:
    """Gives a keeper one shell script after the other and writes down what it is told."""

    def __init__(self, family: Family, *scripts: str, pace: Pace = AT_ONCE) -> None:
        self.scripts = list(scripts)
        self.exits: list[str] = []
        self.started = asyncio.Event()
        self.ended = asyncio.Event()
        self.keeper = Keeper(family, self.spec, started=self.on_start, ended=self.on_end, pace=pace)

    def spec(self) -> Spec:
        return shell(self.scripts.pop(0))

    def on_start(self, member: Member) -> None:
        self.started.set()

    def on_end(self, member: Member, end: Exit) -> None:
        self.exits.append(str(end))
        self.ended.set()
        if not self.scripts:
            self.keeper.end()


async def test_a_child_that_ends_is_started_again(family: Family) -> None:
    script = Script(family, "exit 1", "kill -9 $$", "exit 0")

    await script.keeper.run()

    assert script.exits == ["exit code 1", "killed by SIGKILL", "exit code 0"]
    assert family.metrics.get("taskd_respawns_total") == 2


async def test_quick_deaths_are_counted_until_a_child_is_healthy(family: Family) -> None:
    counts: list[int] = []

    class Counting(Script):
        def on_start(self, member: Member) -> None:
            counts.append(self.keeper.quick_deaths)
            if not self.scripts:
                self.keeper.healthy()

    script = Counting(family, "exit 1", "exit 1", "exit 1")
    await script.keeper.run()

    assert counts == [0, 1, 2]
    assert script.keeper.quick_deaths == 0


async def test_exit_78_is_final(family: Family) -> None:
    script = Script(family, "exit 78", "exit 0")

    end = await script.keeper.run()

    assert end is not None
    assert end.code == 78
    assert script.scripts == ["exit 0"]


async def test_a_child_that_was_asked_to_end_is_not_started_again(family: Family) -> None:
    script = Script(family, "exec sleep 1000", "exit 0")
    running = asyncio.create_task(script.keeper.run())
    await script.started.wait()

    await script.keeper.stop(grace_s=DEADLINE_S)

    end = await running
    assert end is not None
    assert str(end) == "killed by SIGTERM"
    assert script.scripts == ["exit 0"]


async def test_a_stop_ends_the_wait_for_the_next_start(family: Family) -> None:
    script = Script(family, "exit 1", "exit 0", pace=NEVER)
    running = asyncio.create_task(script.keeper.run())
    await script.ended.wait()

    await script.keeper.stop(grace_s=0)

    await asyncio.wait_for(running, DEADLINE_S)


async def test_a_program_that_is_missing_is_tried_again(
    family: Family, caplog: pytest.LogCaptureFixture
) -> None:
    specs = [Spec(name="x", argv=["/no/such/program"], env={}), shell("exit 78")]
    keeper = Keeper(family, lambda: specs.pop(0), pace=AT_ONCE)

    with caplog.at_level(logging.ERROR):
        end = await keeper.run()

    assert end is not None
    assert end.code == 78
    assert "child can't be started" in caplog.text


async def test_a_cancelled_keeper_kills_its_child(family: Family, outlet: Outlet) -> None:
    script = Script(family, "exec sleep 1000", "exit 0")
    running = asyncio.create_task(script.keeper.run())
    await script.started.wait()
    (member,) = family.members.values()

    running.cancel()

    assert str(await member.wait()) == "killed by SIGKILL"
