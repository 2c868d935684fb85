"""The child that runs one job at a time, spoken to over its pipe."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import msgspec
import pytest

from taskd.wire import Cancel, Finished, Ready, Started, Stop, frame
from tests.child.driver import Child, child_env

HOSTILE = "tests.child.hostile"


@pytest.fixture(scope="module")
def child() -> Iterator[Child]:
    """One child for all tests that leave it alive and well."""
    types = ["sync_noop", "sys_exit", "check", "threads", "reads_stdin", "progresses", "wait", "set_variable"]
    with Child(HOSTILE, [*types, "swallow", "speaks", "environment", "raises"], isolation="process") as child:
        assert type(child.ready()) is Ready
        yield child
        assert child.stop() == 0


def test_a_plain_def_runs(child: Child) -> None:
    run = child.start("sync_noop")
    finished = child.finished(run)

    assert (finished.outcome, bytes(finished.result)) == ("completed", b"null")
    assert child.seen.index(Started([run])) < child.seen.index(finished)


def test_many_jobs_at_once_run_one_after_the_other_in_order(child: Child) -> None:
    runs = child.start_many([("sync_noop", {})] * 500)
    child.finished(runs[-1])

    events = [
        m.runs[0] if type(m) is Started else m.run for m in child.seen if type(m) in (Started, Finished)
    ]
    assert [run for run in events if run in set(runs)] == [run for run in runs for _ in range(2)]


def test_an_async_def_can_be_set_apart_and_cancelled(child: Child) -> None:
    run = child.start("wait")
    child.progress(run)
    child.send(Cancel(run, "cancelled"))

    assert child.finished(run).outcome == "cancelled"


def test_context_variables_do_not_pass_from_job_to_job(child: Child) -> None:
    assert [bytes(child.run("set_variable").result) for _ in range(2)] == [b'"clean"', b'"clean"']


def test_sys_exit_ends_the_attempt_and_not_the_process(child: Child) -> None:
    assert child.run("sys_exit", {"code": 3}).error == "SystemExit: 3"
    assert child.run("sync_noop").outcome == "completed"


@pytest.mark.parametrize(("reason", "outcome"), [("timeout", "timeout"), ("cancelled", "cancelled")])
def test_check_stops_a_job_that_was_asked_to(child: Child, reason: str, outcome: str) -> None:
    run = child.start("check")
    child.progress(run)
    child.send(Cancel(run, reason))

    assert child.finished(run).outcome == outcome


def test_check_stops_a_job_whose_time_is_over(child: Child) -> None:
    assert child.run("check", timeout_s=0.05).outcome == "timeout"


def test_a_job_that_waits_is_dropped_by_a_cancel(child: Child) -> None:
    running = child.start("check")
    child.progress(running)
    waiting = child.start("sync_noop")

    child.send(Cancel(waiting, "cancelled"))

    finished = child.finished(waiting)
    assert (finished.outcome, finished.started) == ("dropped", False)
    child.send(Cancel(running, "cancelled"))
    child.finished(running)


def test_what_a_thread_of_the_handler_prints_is_kept(child: Child) -> None:
    run = child.start("threads")
    child.finished(run)

    assert child.lines(run) == ["from a plain thread"]


def test_standard_input_is_empty(child: Child) -> None:
    assert bytes(child.run("reads_stdin").result) == b'""'


def test_progress_without_end_becomes_few_messages(child: Child) -> None:
    run = child.start("progresses")
    child.finished(run)

    said = [
        message
        for message in child.seen
        if getattr(message, "percent", None) is not None and message.run == run
    ]
    assert said[-1].message == "step 99999"
    assert len(said) < 50_000


def test_the_environment_is_what_the_supervisor_gave(child: Child) -> None:
    environment = msgspec.json.decode(child.run("environment").result)

    assert environment.pop("LC_CTYPE", "C.UTF-8") == "C.UTF-8"  # set by Python itself (PEP 538)
    assert set(environment) == {"PATH", "PYTHONPATH", "TASKD_NODE"}


def test_a_run_that_fails_tells_what_it_has_used(child: Child) -> None:
    finished = child.run("raises", {"what": "plain"})

    assert finished.cpu_s is not None
    assert finished.max_rss is not None
    assert finished.cpu_s >= 0
    assert finished.max_rss > 1 << 20


def test_a_stop_ends_after_the_running_job_and_drops_the_others() -> None:
    with Child(HOSTILE, ["check", "sync_noop"], isolation="process") as child:
        running = child.start("check", timeout_s=0.2)
        child.progress(running)
        waiting = child.start_many([("sync_noop", {})] * 2, more=[Stop()])

        assert [child.finished(run).outcome for run in waiting] == ["dropped", "dropped"]
        assert child.finished(running).outcome == "timeout"
        child.read_to_end()
        assert child.process.wait(30) == 0


@pytest.mark.parametrize("how", ["exit", "abort", "null", "kill", "descriptors"])
def test_a_job_that_kills_the_process_was_started_and_is_never_finished(how: str) -> None:
    with Child(HOSTILE, ["die"], isolation="process") as child:
        run = child.start("die", {"how": how})

        with pytest.raises(EOFError):
            child.finished(run)

        assert Started([run]) in child.seen
        assert child.process.wait(30) != 0


def test_the_jobs_behind_a_killer_were_not_started() -> None:
    with Child(HOSTILE, ["die", "sync_noop"], isolation="process") as child:
        killer, *_ = child.start_many([("die", {"how": "kill"})] + [("sync_noop", {})] * 10)
        child.read_to_end()

        started = [message.runs for message in child.seen if type(message) is Started]
        assert started == [[killer]]


def test_the_end_of_the_pipe_ends_a_child_whose_handler_is_deaf() -> None:
    with Child(HOSTILE, ["blocks_signals"], isolation="process") as child:
        child.progress(child.start("blocks_signals"))
        child.pipe.close()

        assert child.process.wait(30) == -signal.SIGKILL


def test_stop_signals_do_not_end_a_job() -> None:
    with Child(HOSTILE, ["check", "sync_noop"], isolation="process") as child:
        run = child.start("check", timeout_s=0.3)
        child.progress(run)
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(child.process.pid, number)

        assert child.finished(run).outcome == "timeout"
        assert child.run("sync_noop").outcome == "completed"


def test_memory_without_end_is_a_memory_error_and_the_process_starts_anew() -> None:
    with Child(HOSTILE, ["allocates", "sync_noop"], isolation="process", max_memory=256 << 20) as child:
        run, behind = child.start_many([("allocates", {}), ("sync_noop", {})])

        finished = child.finished(run)

        assert (finished.outcome, finished.error) == ("error", "MemoryError")
        assert child.finished(behind).outcome == "dropped"
        child.read_to_end()
        assert child.process.wait(30) == 0


def test_descriptors_without_end_are_an_error_and_the_process_starts_anew() -> None:
    with Child(HOSTILE, ["opens"], isolation="process") as child:
        finished = child.run("opens")

        assert finished.outcome == "error"
        assert "Too many open files" in (finished.error or "")
        child.read_to_end()
        assert child.process.wait(30) == 0


def test_a_process_that_a_job_left_behind_retires_the_child() -> None:
    with Child(HOSTILE, ["leaves_children", "sync_noop"], isolation="process") as child:
        run, behind = child.start_many([("leaves_children", {}), ("sync_noop", {})])

        left = int(bytes(child.finished(run).result))

        assert child.finished(behind).outcome == "dropped"
        assert os.getpgid(left) == child.process.pid  # so whoever ends the group ends it
        child.read_to_end()
        assert child.process.wait(30) == 0
        os.killpg(child.process.pid, signal.SIGKILL)


def test_a_copy_made_by_fork_does_not_speak_for_the_child() -> None:
    with Child(HOSTILE, ["forks", "sync_noop"], isolation="process") as child:
        run = child.start("forks")

        assert bytes(child.finished(run).result) == b'"parent"'
        child.pipe.close()
        child.process.wait(30)

        assert sum(type(message) is Finished and message.run == run for message in child.seen) == 1


def test_the_child_dies_with_its_parent() -> None:
    """The kernel kills it; the pipe here stays open, so that it can't be the reason."""
    ours, theirs = socket.socketpair()
    ours.settimeout(30)
    code = (
        "import subprocess, sys\n"
        "argv = [sys.executable, '-m', 'taskd.child', '--fd', sys.argv[1]]\n"
        "p = subprocess.Popen(argv, pass_fds=[int(sys.argv[1])])\n"
        "sys.stdin.read()"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(theirs.fileno())],
        pass_fds=[theirs.fileno()],
        stdin=subprocess.PIPE,
        env=child_env(),
    )
    theirs.close()
    ours.sendall(frame([Child(HOSTILE, ["noop"]).setup]))
    ours.recv(4096)

    parent.kill()
    parent.communicate()

    assert ours.recv(4096) == b""
    ours.close()
