"""Members start, are told apart from what they leave behind, and end with all of it."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace

import pytest

from taskd.process.family import Family, SpawnFailed, Spec, _peak_memory
from taskd.process.leftovers import own_children

from .conftest import DEADLINE_S, Outlet, dead, environ, is_running, open_descriptors, python, shell


async def test_an_exit_tells_its_code(family: Family) -> None:
    member = await family.spawn(shell("exit 75"))

    end = await member.wait()

    assert (end.code, end.signal, str(end)) == (75, None, "exit code 75")


async def test_an_exit_tells_its_signal(family: Family) -> None:
    member = await family.spawn(shell("kill -SEGV $$"))

    end = await member.wait()

    assert (end.code, end.signal, str(end)) == (None, signal.SIGSEGV, "killed by SIGSEGV")


async def test_an_exit_tells_what_it_cost(family: Family) -> None:
    # More than the peak of this process, which a whole run of the tests has made large.
    size = _peak_memory() + 2**27
    member = await family.spawn(python(f"block = b'x' * {size}; sum(range(10**6))"))

    end = await member.wait()

    assert end.cpu_s > 0.01
    assert end.max_rss is not None
    assert size < end.max_rss < size + 2**28


async def test_memory_below_the_supervisors_own_is_not_claimed(family: Family) -> None:
    member = await family.spawn(shell(":"))

    end = await member.wait()

    assert end.max_rss is None


async def test_a_member_leads_a_session_and_group_of_its_own(family: Family) -> None:
    member = await family.spawn(shell("exec sleep 1000"))

    assert (os.getsid(member.pid), os.getpgid(member.pid)) == (member.pid, member.pid)


async def test_a_member_gets_exactly_the_environment_of_its_spec(family: Family, outlet: Outlet) -> None:
    spec = Spec(name="env", argv=["/usr/bin/env"], env={"ONLY": "this"}, stdout=outlet.write)

    await (await family.spawn(spec)).wait()

    assert outlet.line() == "ONLY=this"


async def test_listening_sockets_are_inherited_and_nothing_else_is(family: Family, outlet: Outlet) -> None:
    script = "import os; print([fd for fd in range(99) if os.path.exists(f'/proc/self/fd/{fd}')])"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        os.set_inheritable(outlet.read, True)  # what a careless library leaves open

        spec = python(script, pass_fds=[listener.fileno()], stdout=outlet.write)
        await (await family.spawn(spec)).wait()

        assert outlet.line() == str([0, 1, 2, listener.fileno()])


async def test_a_member_talks_over_its_pipe_and_its_end_is_the_pipes_end(family: Family) -> None:
    script = "import socket, sys; s = socket.socket(fileno=int(sys.argv[2])); s.send(s.recv(99).upper())"
    member = await family.spawn(python(script, pipe_option="--fd"))
    loop = asyncio.get_running_loop()
    assert member.pipe is not None

    with member.pipe:
        await loop.sock_sendall(member.pipe, b"hello")
        answers = [await loop.sock_recv(member.pipe, 99), await loop.sock_recv(member.pipe, 99)]

    assert answers == [b"HELLO", b""]


async def test_stop_asks_first(family: Family, outlet: Outlet) -> None:
    script = "trap 'exit 3' TERM; echo ready; while :; do sleep 1000 & wait; done"
    member = await family.spawn(shell(script, stdout=outlet.write))
    outlet.line()

    end = await member.stop(grace_s=DEADLINE_S)

    assert end.code == 3


async def test_stop_kills_what_does_not_listen(family: Family, outlet: Outlet) -> None:
    script = "trap '' TERM; echo ready; while :; do sleep 1000; done"
    member = await family.spawn(shell(script, stdout=outlet.write))
    outlet.line()

    end = await member.stop(grace_s=0.05)

    assert end.signal == signal.SIGKILL


async def test_stop_ends_a_frozen_member(family: Family) -> None:
    member = await family.spawn(shell("exec sleep 1000"))
    member.send(signal.SIGSTOP)
    os.waitid(os.P_PID, member.pid, os.WSTOPPED)

    end = await member.stop(grace_s=0.05)

    assert end.signal == signal.SIGKILL


async def test_a_dead_member_can_be_signalled_without_harm(family: Family) -> None:
    member = await family.spawn(shell("exit 0"))
    await member.wait()

    member.send(signal.SIGTERM)
    member.kill()

    assert (await member.stop(grace_s=0)).code == 0


async def test_cancelling_a_wait_leaves_the_exit_to_others(family: Family) -> None:
    member = await family.spawn(shell("exec sleep 1000"))
    impatient = asyncio.create_task(member.wait())
    patient = asyncio.create_task(member.wait())
    await asyncio.wait({impatient}, timeout=0)

    impatient.cancel()
    member.kill()

    assert (await patient).signal == signal.SIGKILL


OFFSPRING = {
    "in its group": "subprocess.Popen(argv)",
    "in a group of its own": "subprocess.Popen(argv, process_group=0)",
    "in a session of its own": "subprocess.Popen(argv, start_new_session=True)",
    "of a command": "subprocess.Popen(['sh', '-c', 'sleep 1000 & echo $!; wait'], process_group=0)",
}


@pytest.mark.parametrize("start", OFFSPRING.values(), ids=OFFSPRING.keys())
async def test_grandchildren_are_dead_when_the_exit_is_told(
    family: Family, outlet: Outlet, start: str
) -> None:
    script = f"""
import subprocess, signal
argv = ["sh", "-c", "echo $$; exec sleep 1000"]
{start}
signal.pause()
"""
    spec = replace(python(script, stdout=outlet.write), env=environ(TASKD_NODE="test"))
    member = await family.spawn(spec)
    grandchild = int(outlet.line())

    member.kill()
    await member.wait()

    assert not is_running(grandchild)


async def test_grandchildren_die_also_when_their_parent_ends_well(family: Family, outlet: Outlet) -> None:
    member = await family.spawn(shell("sleep 1000 & echo $!", stdout=outlet.write))
    grandchild = int(outlet.line())

    end = await member.wait()

    assert end.code == 0
    assert not is_running(grandchild)


async def test_a_crowd_of_grandchildren_dies(family: Family, outlet: Outlet) -> None:
    script = "for i in $(seq 300); do sleep 1000 & done; echo ready; wait"
    member = await family.spawn(shell(script, stdout=outlet.write))
    outlet.line()

    member.kill()
    await member.wait()

    assert [kin for kin in own_children() if kin.session == member.pid] == []


async def test_what_others_started_is_left_alone(family: Family) -> None:
    clean = {"PATH": os.defpath}
    with subprocess.Popen(["sleep", "1000"], start_new_session=True, env=clean) as server:
        member = await family.spawn(shell("exec sleep 1000"))

        member.kill()
        await member.wait()

        assert server.poll() is None
        server.kill()


async def test_the_exit_status_of_a_spared_process_is_left_to_its_owner(family: Family) -> None:
    server = subprocess.Popen(["sh", "-c", "exit 3"], start_new_session=True, env={"PATH": os.defpath})
    family.spare(server.pid)
    os.waitid(os.P_PID, server.pid, os.WEXITED | os.WNOWAIT)

    await (await family.spawn(shell(":"))).wait()

    assert server.wait() == 3


async def test_orphans_that_are_already_dead_are_reaped(family: Family, outlet: Outlet) -> None:
    """Such come up to `taskd up` when the supervisor below it is killed with its children."""
    await family.spawn(shell("(setsid sh -c 'echo $$' &); exec sleep 1000", stdout=outlet.write))
    orphan = int(outlet.line())
    os.waitid(os.P_PID, orphan, os.WEXITED | os.WNOWAIT)

    await (await family.spawn(shell(":"))).wait()

    assert orphan not in [kin.pid for kin in own_children()]


async def test_what_a_living_neighbour_started_is_left_alone(family: Family, outlet: Outlet) -> None:
    spec = shell("(sleep 1000 & echo $!); exec sleep 1000", stdout=outlet.write)
    await family.spawn(replace(spec, env=environ(TASKD_NODE="test")))
    orphan = int(outlet.line())  # its parent, the subshell, is gone: it is our child now, like a leftover
    victim = await family.spawn(shell("exec sleep 1000"))

    victim.kill()
    await victim.wait()

    assert is_running(orphan)


async def test_a_program_that_is_missing_is_named(family: Family) -> None:
    before = open_descriptors()

    with pytest.raises(SpawnFailed, match="no/such/program"):
        await family.spawn(Spec(name="x", argv=["/no/such/program"], env={}, pipe_option="--fd"))

    assert open_descriptors() == before


async def test_members_leave_no_descriptors_behind(family: Family) -> None:
    await (await family.spawn(shell(":"))).wait()
    before = open_descriptors()

    for _ in range(5):
        await (await family.spawn(shell("sleep 1000 & :"))).wait()

    assert open_descriptors() == before
    assert family.members == {}


async def test_children_are_started_from_the_main_thread_alone(family: Family) -> None:
    """The death signal of a child goes off when the thread ends that started it."""

    def elsewhere() -> None:
        asyncio.run(start())

    async def start() -> None:
        await family.spawn(shell(":"))

    with pytest.raises(RuntimeError, match="main thread"):
        await asyncio.to_thread(elsewhere)


SUPERVISOR = """
import asyncio, logging, os, sys, uvloop
from taskd.process.family import Family, Spec
child = '''
import os, signal
from taskd.process.prctl import die_with_parent
die_with_parent(int(os.environ["PARENT"]))
print(os.getpid(), flush=True)
signal.pause()
'''
async def main():
    family = Family(logging.getLogger())
    environ = {**os.environ, "PARENT": str(os.getpid())}
    for n in range(3):
        await family.spawn(Spec(name="child", argv=[sys.executable, "-c", child], env=environ))
    await asyncio.Event().wait()
uvloop.run(main())
"""


async def test_a_supervisor_killed_with_9_leaves_no_orphans(outlet: Outlet) -> None:
    supervisor = subprocess.Popen([sys.executable, "-c", SUPERVISOR], env=environ(), stdout=outlet.write)
    orphans = [os.pidfd_open(int(outlet.line())) for _ in range(3)]

    supervisor.kill()
    supervisor.wait()

    for orphan in orphans:
        await dead(orphan)


async def test_one_kill_of_the_family_ends_all(family: Family) -> None:
    members = [await family.spawn(shell("trap '' TERM; exec sleep 1000")) for _ in range(5)]

    await family.kill()

    assert [member.alive for member in members] == [False] * 5
