"""The child that runs many jobs at once, spoken to over its pipe."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from taskd.child.outbox import MAX_LINE
from taskd.wire import Cancel, Finished, Ready, Started, Stop
from tests.child.driver import Child

HOSTILE = "tests.child.hostile"
TYPES = [
    *("noop", "sys_exit_async", "interrupt", "wait", "wait_and_clean", "finish_anyway", "cancel_self"),
    *("current_task", "set_variable", "returns", "raises", "ends", "speaks", "floods", "long_line", "late"),
    *("progress", "point", "mail", "typed", "context", "submits"),
]


@pytest.fixture(scope="module")
def child() -> Iterator[Child]:
    """One child for all tests that leave it alive and well."""
    with Child(HOSTILE, [*TYPES, "second=noop"], type_options={"lane": "slow"}) as child:
        assert type(child.ready()) is Ready
        yield child
        assert child.stop() == 0


def test_a_job_is_started_then_finished(child: Child) -> None:
    run = child.start("noop")

    finished = child.finished(run)

    assert (finished.outcome, finished.started, bytes(finished.result)) == ("completed", True, b"null")
    assert child.seen.index(Started([run])) < child.seen.index(finished)


def test_a_second_lane_runs_the_same_handler(child: Child) -> None:
    assert child.run("second").outcome == "completed"


def test_a_type_that_the_child_does_not_know_is_an_error_and_not_started(child: Child) -> None:
    finished = child.run("unheard_of")

    assert (finished.outcome, finished.started) == ("error", False)


@pytest.mark.parametrize(
    ("type", "payload", "error"),
    [
        pytest.param("sys_exit_async", {"code": 3}, "SystemExit: 3", id="sys.exit"),
        pytest.param("interrupt", {}, "KeyboardInterrupt", id="KeyboardInterrupt"),
        pytest.param("cancel_self", {}, "CancelledError", id="a cancel that nobody asked for"),
        pytest.param("raises", {"what": "plain"}, "ValueError: plain", id="an exception"),
        pytest.param(
            "raises", {"what": "nul"}, "ValueError: a\ufffdb\ufffd", id="text that Postgres refuses"
        ),
        pytest.param(
            "raises", {"what": "unprintable"}, "Unprintable: (its text can't be made)", id="no text"
        ),
        pytest.param("raises", {"what": "group"}, "ExceptionGroup: several (2 sub-exceptions)", id="a group"),
    ],
)
def test_whatever_a_handler_raises_ends_its_attempt_as_an_error(
    child: Child, type: str, payload: object, error: str
) -> None:
    finished = child.run(type, payload)

    assert (finished.outcome, finished.error) == ("error", error)
    assert child.run("noop").outcome == "completed"


def test_endless_recursion_is_an_error(child: Child) -> None:
    assert child.error("raises", {"what": "recursion"}).startswith("RecursionError")


def test_an_error_text_is_cut_at_a_character(child: Child) -> None:
    error = child.error("raises", {"what": "long"})

    assert error.rstrip("é") == "ValueError: "
    assert 8 * 1024 - 2 < len(error.encode()) <= 8 * 1024


def test_the_traceback_of_an_error_is_kept_with_the_job_and_begins_in_its_handler(child: Child) -> None:
    run = child.start("raises", {"what": "plain"})
    child.finished(run)

    [trace] = child.lines(run)
    assert trace.startswith("Traceback")
    assert "hostile.py" in trace.splitlines()[1]


@pytest.mark.parametrize(
    ("how", "outcome", "error", "delay_s", "exit_code"),
    [
        pytest.param("retry", "retry_later", "busy", 90.0, None, id="RetryLater"),
        pytest.param("retry by policy", "retry_later", "", None, None, id="RetryLater without a delay"),
        pytest.param("fail", "fail", "no such user", None, None, id="Fail"),
        pytest.param("coded", "fail", "refused", None, 9, id="Fail with the code of a program"),
        pytest.param("snooze", "snoozed", "", 2.5, None, id="Snooze"),
    ],
)
def test_a_handler_says_how_it_ends(
    child: Child, how: str, outcome: str, error: str, delay_s: float | None, exit_code: int | None
) -> None:
    finished = child.run("ends", {"how": how})

    assert (finished.outcome, finished.error, finished.delay_s) == (outcome, error, delay_s)
    assert finished.exit_code == exit_code


@pytest.mark.parametrize(
    ("what", "result"),
    [
        pytest.param("nul", '{"a\ufffdb":"c\ufffdd"}', id="U+0000 is replaced"),
        pytest.param("surrogate", '["\ufffd",{"\ufffd":1}]', id="lone surrogates are replaced"),
        pytest.param("nan", "[null,null]", id="what is no number in JSON is null"),
        pytest.param("int308", "1" + "0" * 308, id="as many digits as a double can have"),
        pytest.param("64", "[" * 64 + "1" + "]" * 64, id="as deep as can be"),
        pytest.param("struct", '{"x":1,"y":2}', id="a dataclass"),
        pytest.param("escaped", '"\\\\u0000"', id="a backslash that only looks like U+0000"),
    ],
)
def test_a_result_is_made_fit_for_postgres(child: Child, what: str, result: str) -> None:
    run = child.start("returns", {"what": what})

    assert bytes(child.finished(run).result).decode() == result
    assert child.lines(run) == []


@pytest.mark.parametrize("what", ["deep", "cycle", "big", "int", "int310", "object"])
def test_a_result_that_can_not_be_stored_is_null_with_a_warning_and_completes(
    child: Child, what: str
) -> None:
    run = child.start("returns", {"what": what})

    finished = child.finished(run)

    assert (finished.outcome, bytes(finished.result)) == ("completed", b"null")
    assert "the result is not kept" in child.lines(run)[0]


@pytest.mark.parametrize(
    ("type", "payload", "problem"),
    [
        pytest.param("typed", b'{"name":"a","times":0}', "times", id="a broken constraint"),
        pytest.param("typed", b'{"name":1}', "name", id="a wrong type"),
        pytest.param("typed", b'{"name":"a","other":1}', "other", id="an unknown member"),
        pytest.param("typed", b"{}", "name", id="a missing member"),
        pytest.param("point", b'{"where":{"x":1}}', "where", id="a class takes the payload whole"),
        pytest.param("point", b'{"x":1,"z":1}', "z", id="an unknown member of a class"),
        pytest.param("typed", b'{"name":' + b"1" * 5001 + b"}", "range", id="more digits than Python reads"),
        pytest.param("returns", b'{"what":' + b"[" * 500 + b"]" * 500 + b"}", "what", id="too deep"),
    ],
)
def test_a_payload_that_does_not_fit_never_reaches_the_handler(
    child: Child, type: str, payload: bytes, problem: str
) -> None:
    finished = child.run(type, payload)

    assert (finished.outcome, finished.started) == ("invalid_payload", False)
    assert problem in (finished.error or "")


def test_a_whole_number_with_a_point_is_an_integer_as_it_is_to_json_schema(child: Child) -> None:
    assert bytes(child.run("typed", b'{"name":"a","times":2.0}').result) == b'"aa"'


def test_a_typed_class_gets_the_whole_payload(child: Child) -> None:
    assert bytes(child.run("point", {"x": 3}).result) == b"3"


def test_a_secret_member_is_masked_in_errors_and_lines(child: Child) -> None:
    run = child.start("mail", {"to": "a", "password": "hunter2"})

    assert child.finished(run).error == "ValueError: login failed: ***"
    assert child.lines(run)[0] == "sending with ***"
    assert not any("hunter2" in line for line in child.lines(run))


def test_the_context_tells_about_the_job(child: Child) -> None:

    finished = child.run("context", attempt=2, max_attempts=7, job_id="0190", timeout_s=30.0)

    told = msgspec.json.decode(finished.result)
    assert 29 < told.pop("remaining") <= 30
    assert told.pop("deadline").endswith("Z")
    assert told == {
        "job_id": "0190",
        "type": "context",
        "attempt": 2,
        "max_attempts": 7,
        "key": "taskd/0190",
        "options": {"lane": "slow"},
        "cancelled": False,
    }


def test_submitted_jobs_travel_with_the_completion(child: Child) -> None:
    finished = child.run("submits")

    assert [bytes(body) for body in finished.submits] == [
        b'{"type":"greet","payload":{"name":"Ada"},"priority":5,"delay":2}',
        b'{"type":"greet","payload":{"name":"Eve"}}',
    ]


def test_a_run_that_fails_submits_nothing(child: Child) -> None:
    run = child.start("submits", {"fail": True})

    assert child.finished(run).submits == []
    assert any("are dropped" in line for line in child.lines(run))


def test_all_that_a_handler_says_is_kept_with_its_job(child: Child) -> None:
    run = child.start("speaks")
    child.finished(run)

    lines = child.lines(run)

    assert lines[:4] == ["printed", "to stderr", "logged well", "some.library: from a library"]
    assert lines[4].startswith("py.warnings: ")
    assert "watch out" in lines[4]
    assert lines[5:] == ["half a line", "from a thread", "no end of line"]


def test_lines_are_limited_for_each_run_and_the_limit_is_told(child: Child) -> None:
    run = child.start("floods", {"lines": 1000})
    child.finished(run)

    lines = child.lines(run)

    assert lines[:100] == [str(number) for number in range(100)]
    assert lines[100:] == ["taskd: lines after the first 100 are dropped"]


def test_a_line_is_cut(child: Child) -> None:
    run = child.start("long_line")
    child.finished(run)

    assert [len(line) for line in child.lines(run)] == [MAX_LINE]


def test_nothing_follows_the_end_of_a_run(child: Child) -> None:
    run = child.start("late")
    child.finished(run)
    child.run("noop")

    assert child.lines(run) == []


def test_progress_is_sent_before_the_end(child: Child) -> None:
    run = child.start("progress", {"percent": 50})
    finished = child.finished(run)

    progress = child.progress(run)
    assert (progress.percent, progress.message) == (50.0, "so far")
    assert child.seen.index(progress) < child.seen.index(finished)


def test_progress_beyond_100_is_refused(child: Child) -> None:
    assert "between 0 and 100" in child.error("progress", {"percent": 101})


def test_a_handler_that_waits_is_in_a_task_of_its_own(child: Child) -> None:
    assert bytes(child.run("current_task").result) == b"true"


def test_context_variables_do_not_pass_from_job_to_job(child: Child) -> None:
    assert [bytes(child.run("set_variable").result) for _ in range(2)] == [b'"clean"', b'"clean"']


def test_a_run_that_takes_too_long_is_stopped_as_a_timeout(child: Child) -> None:
    finished = child.run("wait", timeout_s=0.05)

    assert (finished.outcome, finished.error) == ("timeout", "timed out after 0.05 s")


def test_each_run_has_its_own_timeout(child: Child) -> None:
    long = child.start("wait")
    short = child.start("wait", timeout_s=0.05)
    shorter = child.start("wait", timeout_s=0.01)

    assert child.finished(short).outcome == child.finished(shorter).outcome == "timeout"
    assert not any(type(message) is Finished and message.run == long for message in child.seen)
    child.send(Cancel(long, "cancelled"))
    child.finished(long)


@pytest.mark.parametrize(
    ("reason", "outcome"), [("cancelled", "cancelled"), ("timeout", "timeout"), ("interrupted", "cancelled")]
)
def test_a_running_job_is_stopped_when_asked(child: Child, reason: str, outcome: str) -> None:
    run = child.start("wait")
    child.progress(run)

    child.send(Cancel(run, reason))

    assert child.finished(run).outcome == outcome


def test_a_handler_that_fails_on_its_way_out_was_cancelled_all_the_same(child: Child) -> None:
    run = child.start("wait_and_clean")
    child.progress(run)
    child.send(Cancel(run, "cancelled"))

    finished = child.finished(run)

    assert (finished.outcome, finished.error) == ("cancelled", "RuntimeError: clean-up failed")


def test_a_handler_that_finishes_all_the_same_is_completed(child: Child) -> None:
    run = child.start("finish_anyway")
    child.progress(run)
    child.send(Cancel(run, "cancelled"))

    assert bytes(child.finished(run).result) == b'"done, True"'


def test_a_cancel_for_a_run_that_is_over_changes_nothing(child: Child) -> None:
    run = child.start("noop")
    child.finished(run)
    child.send(Cancel(run, "cancelled"), Cancel(999_999, "cancelled"))

    assert child.run("noop").outcome == "completed"
    assert sum(type(message) is Finished and message.run == run for message in child.seen) == 1


def test_starts_and_cancels_in_any_mix_are_each_answered_once(child: Child) -> None:
    jobs: list[tuple[str, Any]] = [("noop", {}), ("wait", {}), ("current_task", {})] * 100
    first = child._next_run + 1
    cancels = [
        Cancel(first + number, "cancelled") for number in range(len(jobs)) if jobs[number][0] == "wait"
    ]

    runs = child.start_many(jobs, more=cancels)

    outcomes = [child.finished(run).outcome for run in runs]
    assert set(outcomes[1::3]) <= {"dropped", "cancelled"}
    assert set(outcomes[0::3]) == {"completed"}
    counted = [
        message.run for message in child.seen if type(message) is Finished and message.run in set(runs)
    ]
    assert sorted(counted) == runs


def test_a_stop_lets_running_jobs_end_and_drops_the_others() -> None:
    with Child(HOSTILE, ["wait", "noop"], slots=1) as child:
        running = child.start("wait", timeout_s=0.2)
        child.progress(running)
        waiting = child.start_many([("noop", {}), ("noop", {})], more=[Stop()])

        assert [child.finished(run).outcome for run in waiting] == ["dropped", "dropped"]
        assert [child.finished(run).started for run in waiting] == [False, False]
        assert child.finished(running).outcome == "timeout"
        child.read_to_end()
        assert child.process.wait(30) == 0


def test_a_child_runs_no_more_than_its_slots_at_once() -> None:
    with Child(HOSTILE, ["wait", "noop"], slots=2) as child:
        first, second, third = child.start_many([("wait", {})] * 3)
        child.progress(first)
        child.progress(second)
        assert Started([third]) not in child.seen

        child.send(Cancel(first, "cancelled"))

        child.progress(third)


def test_the_end_of_the_pipe_ends_the_child_and_its_jobs_at_once() -> None:
    with Child(HOSTILE, ["swallow"]) as child:
        child.started(child.start("swallow"))
        child.pipe.close()

        assert child.process.wait(30) == -signal.SIGKILL


def test_a_handler_that_ignores_its_cancel_is_left_for_the_supervisor_to_kill() -> None:
    with Child(HOSTILE, ["swallow", "noop"]) as child:
        run = child.start("swallow", timeout_s=0.05)
        while "swallowed" not in child.lines(run):
            child._read()

        assert child.run("noop").outcome == "completed"
        assert not any(type(message) is Finished and message.run == run for message in child.seen)
        child.process.kill()


@pytest.mark.parametrize("how", ["exit", "abort", "null", "kill", "descriptors"])
def test_a_job_that_kills_the_process_was_started_and_is_never_finished(how: str) -> None:
    with Child(HOSTILE, ["die_async"]) as child:
        run = child.start("die_async", {"how": how})

        with pytest.raises(EOFError):
            child.finished(run)

        assert Started([run]) in child.seen
        assert child.process.wait(30) != 0


def test_a_copy_made_by_fork_does_not_speak_for_the_child() -> None:
    with Child(HOSTILE, ["forks_async", "noop"]) as child:
        run = child.start("forks_async")
        assert bytes(child.finished(run).result) == b'"parent"'
        for _ in range(20):
            assert child.run("noop").outcome == "completed"

        assert sum(type(message) is Finished and message.run == run for message in child.seen) == 1


def test_a_frame_that_is_none_ends_the_child() -> None:
    with Child(HOSTILE, ["noop"]) as child:
        child.ready()
        child.pipe.sendall(b"\xff\xff\xff\xff")

        assert child.process.wait(30) != 0


def test_a_supervisor_that_reads_late_gets_everything() -> None:
    with Child(HOSTILE, ["floods"], log_lines=2000, slots=20) as child:
        runs = child.start_many([("floods", {"lines": 2000})] * 60)

        assert {child.finished(run).outcome for run in runs} == {"completed"}
        assert all(len(child.lines(run)) == 2000 for run in runs)


def test_the_child_says_nothing_on_its_standard_output() -> None:
    with Child(HOSTILE, ["speaks"]) as child:
        child.run("speaks")
        assert child.stop() == 0

    assert child.out == b""
    assert child.err == b""
