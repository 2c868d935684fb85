"""Job types that run a program: what they let in, and how the program's end becomes the job's."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema_rs
import msgspec
import pytest

from taskd.builtin.command import AllOptions, Options, command_type, taskd_job_types
from taskd.plugin import JobType
from taskd.testing import Outcome, run
from taskd.wire import Cancel
from tests.child.driver import Child

ENVIRON = {"PATH": "/usr/bin:/bin", "TASKD_NODE": "node-1", "DATABASE_URL": "secret", "PYTHONPATH": "/x"}


def shell(script: str, **options: Any) -> JobType:
    """Return a type that runs a script of ours."""
    wanted = msgspec.convert({"command": ["/bin/sh", "-c", script], **options}, Options)
    return command_type("script", wanted, ENVIRON)


def ran(script: str, payload: Mapping[str, Any] | None = None, **options: Any) -> Outcome:
    return run(shell(script, **options), payload or {})


RESIZE = {
    "command": ["/bin/echo", "{file}", "--size={size}", "{{file}}"],
    "params": {"file": r"[a-z0-9/]+\.png", "size": {"type": "integer", "maximum": 9999, "default": 100}},
}


def accepts(options: Mapping[str, Any], payload: Mapping[str, Any]) -> bool:
    job_type = command_type("resize", msgspec.convert(options, Options), ENVIRON)
    return jsonschema_rs.validator_for(job_type.payload).is_valid(dict(payload))


def test_parameters_are_put_into_their_places() -> None:
    outcome = run(
        command_type("resize", msgspec.convert(RESIZE, Options), ENVIRON), {"file": "a.png", "size": 20}
    )

    assert (outcome.kind, outcome.lines) == ("completed", ("a.png --size=20 {file}",))


def test_a_parameter_with_a_default_may_be_left_out() -> None:
    outcome = run(command_type("resize", msgspec.convert(RESIZE, Options), ENVIRON), {"file": "a.png"})

    assert outcome.lines == ("a.png --size=100 {file}",)


@pytest.mark.parametrize(
    "payload",
    [
        pytest.param({"file": "a.png\n"}, id="a line break behind the end"),
        pytest.param({"file": "x\na.png"}, id="a line before the match"),
        pytest.param({"file": "xx a.png"}, id="a match in the middle"),
        pytest.param({"file": "../../etc/shadow"}, id="another path"),
        pytest.param({"file": "--output=/etc/cron.d/x"}, id="an option"),
        pytest.param({"file": "a.png", "size": -1}, id="a number that begins with a dash"),
        pytest.param({"file": "a.png", "size": "1; rm"}, id="no number"),
        pytest.param({"file": "a.png", "extra": 1}, id="an unknown parameter"),
        pytest.param({"size": 1}, id="a missing parameter"),
        pytest.param({"file": ["a.png"]}, id="a list"),
    ],
)
def test_what_does_not_match_in_full_is_refused_by_the_published_schema(payload: dict[str, Any]) -> None:
    assert not accepts(RESIZE, payload)
    assert (
        run(command_type("resize", msgspec.convert(RESIZE, Options), ENVIRON), payload).kind
        == "invalid_payload"
    )


@pytest.mark.parametrize(
    "rule",
    [
        pytest.param(".*", id="a pattern that takes anything"),
        pytest.param("-.*|x", id="a pattern that asks for it"),
        pytest.param({"type": "string"}, id="a schema that takes any text"),
        pytest.param(
            {"type": "string", "allOf": [{"minLength": 1}]}, id="a schema with conditions of its own"
        ),
    ],
)
def test_no_value_begins_with_a_dash_whatever_the_rule_says(rule: Any) -> None:
    options = {"command": ["/bin/echo", "{x}"], "params": {"x": rule}}

    assert not accepts(options, {"x": "-rf"})
    assert accepts(options, {"x": "x"})


def test_alternatives_of_a_pattern_match_in_full_too() -> None:
    options = {"command": ["/bin/echo", "{x}"], "params": {"x": "a|b"}}

    assert [accepts(options, {"x": value}) for value in ("a", "b", "ax", "xb")] == [True, True, False, False]


def test_there_is_no_shell() -> None:
    options = {"command": ["/bin/echo", "{x}"], "params": {"x": ".*"}}

    outcome = run(
        command_type("say", msgspec.convert(options, Options), ENVIRON), {"x": "$(id); `id` > /tmp/x"}
    )

    assert outcome.lines == ("$(id); `id` > /tmp/x",)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        pytest.param({"command": []}, "names no program", id="empty"),
        pytest.param({"command": ["convert"]}, "no absolute path", id="a program that PATH would choose"),
        pytest.param(
            {"command": ["/bin/{file}"]}, "takes no parameter", id="a parameter in the program's name"
        ),
        pytest.param(
            {"command": ["/bin/echo", "{fiel}"]}, "{fiel} is not in params", id="an unknown parameter"
        ),
        pytest.param(
            {"command": ["/bin/echo", "--{file}"]}, "option's name", id="a parameter in an option's name"
        ),
        pytest.param(
            {"command": ["/bin/echo", "-{file}"]}, "option's name", id="a parameter in a short option"
        ),
        pytest.param({"params": {"file": "("}}, "types.resize.params.file", id="no pattern"),
        pytest.param(
            {"params": {"file": "a)|(?:b"}}, "types.resize.params.file", id="brackets that would close ours"
        ),
        pytest.param({"params": {"file": {"type": "array"}}}, "its type must be", id="a list"),
        pytest.param({"params": {"file": {"minLength": 1}}}, "its type must be", id="no type"),
        pytest.param({"params": {"a-b": "x"}}, "a parameter's name", id="a name that no place can have"),
        pytest.param({"cwd": "tmp"}, "no absolute path", id="a relative folder"),
        pytest.param({"timeout": "10"}, "is not a duration", id="a time without a unit"),
    ],
)
def test_a_command_that_can_not_be_is_refused_where_it_is_declared(
    changes: dict[str, Any], problem: str
) -> None:
    options = {"command": ["/bin/echo", "{file}"], "params": {"file": "x"}, **changes}

    with pytest.raises(ValueError, match="resize") as refused:
        taskd_job_types({"types": {"resize": options}})

    assert problem in str(refused.value)


def test_unknown_keys_are_refused() -> None:
    with pytest.raises(msgspec.ValidationError, match="shell"):
        msgspec.convert({"types": {"x": {"command": ["/bin/true"], "shell": True}}}, AllOptions)


@pytest.mark.parametrize(
    ("script", "options", "kind", "exit_code", "error"),
    [
        pytest.param("exit 0", {}, "completed", None, None, id="0 completes"),
        pytest.param("exit 3", {}, "error", 3, "CommandFailed: exit code 3", id="others fail the attempt"),
        pytest.param("exit 75", {}, "retry_later", 75, "exit code 75", id="EX_TEMPFAIL asks for another run"),
        pytest.param("exit 3", {"success_codes": [0, 3]}, "completed", None, None, id="success_codes"),
        pytest.param("exit 4", {"no_retry_codes": [4]}, "fail", 4, "exit code 4", id="no_retry_codes"),
        pytest.param("exit 75", {"no_retry_codes": [75]}, "fail", 75, "exit code 75", id="75 too, if listed"),
        pytest.param(
            "exit 0", {"success_codes": [1]}, "error", 0, "CommandFailed: exit code 0", id="0 is not special"
        ),
        pytest.param(
            "echo one >&2; echo the reason >&2; exit 1",
            {},
            "error",
            1,
            "CommandFailed: exit code 1: the reason",
            id="the last line of the error output is the reason",
        ),
    ],
)
def test_the_exit_code_decides(
    script: str, options: dict[str, Any], kind: str, exit_code: int | None, error: str | None
) -> None:
    outcome = ran(script, **options)

    assert (outcome.kind, outcome.exit_code, outcome.error) == (kind, exit_code, error)


def test_a_signal_is_recorded() -> None:
    outcome = ran("kill -SEGV $$")

    assert (outcome.kind, outcome.exit_code, outcome.signal) == ("error", None, signal.SIGSEGV)
    assert outcome.error == "CommandFailed: killed by SIGSEGV"


def test_a_program_that_is_not_there_is_an_error() -> None:
    options = msgspec.convert({"command": ["/no/such/program"]}, Options)

    outcome = run(command_type("gone", options, ENVIRON), {})

    assert outcome.kind == "error"
    assert "FileNotFoundError" in (outcome.error or "")


@pytest.mark.parametrize(
    ("script", "result"),
    [
        pytest.param("""echo '{"a": [1, 2]}'""", {"a": [1, 2]}, id="an object"),
        pytest.param("echo 42", 42, id="a number"),
        pytest.param("echo '{\"a\": 1} and more'", None, id="JSON with something behind it"),
        pytest.param("echo done", None, id="no JSON"),
        pytest.param("exit 0", None, id="nothing"),
        pytest.param("echo '{}' >&2", None, id="only the standard output counts"),
        pytest.param("echo NaN", None, id="what only looks like JSON"),
    ],
)
def test_json_on_the_standard_output_is_the_result(script: str, result: object) -> None:
    assert ran(script).result == result


def test_both_outputs_are_kept_as_lines() -> None:
    outcome = ran("echo one; echo; printf 'no end'; printf '\\377\\n' >&2")

    assert sorted(outcome.lines) == ["", "no end", "one", "\ufffd"]


def test_output_is_bounded() -> None:
    outcome = ran("head -c 30000000 /dev/zero | tr '\\0' 'x'")

    kept = [line for line in outcome.lines if not line.startswith("taskd:")]
    assert sum(map(len, kept)) == 1 << 20
    assert "taskd: output after the first 1048576 bytes is dropped" in outcome.lines
    assert outcome.kind == "completed"


def test_the_environment_is_clean() -> None:
    outcome = ran("env", env={"MODE": "fast", "TASKD_NODE": "forged"})

    names = dict(line.partition("=")[::2] for line in outcome.lines)
    assert {name: value for name, value in names.items() if name not in ("PWD", "OLDPWD", "SHLVL", "_")} == {
        "PATH": "/usr/bin:/bin",
        "TASKD_NODE": "node-1",
        "TASKD_JOB_ID": "00000000-0000-7000-8000-000000000000",
        "TASKD_ATTEMPT": "1",
        "TASKD_IDEMPOTENCY_KEY": "taskd/00000000-0000-7000-8000-000000000000",
        "MODE": "fast",
    }


def test_the_folder_is_fixed(tmp_path: Path) -> None:
    assert ran("pwd").lines == ("/",)
    assert ran("pwd", cwd=str(tmp_path)).lines == (str(tmp_path),)


def test_the_standard_input_is_empty() -> None:
    assert ran("cat; echo end").lines == ("end",)


def test_no_descriptor_of_the_child_is_inherited() -> None:
    assert ran("ls /proc/self/fd").lines == ("0", "1", "2", "3")  # 3 is the folder that ls reads


@pytest.fixture
def alive(tmp_path: Path) -> Iterator[Path]:
    """A named pipe that the programs below hold open as long as they or their children live."""
    pipe = tmp_path / "alive"
    os.mkfifo(pipe)
    reading = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    yield pipe
    os.close(reading)


def wait_for_all_dead(alive: Path) -> None:
    """Return when nobody holds `alive` open for writing any more."""
    reading = os.open(alive, os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(reading, True)
    assert os.read(reading, 1) == b""
    os.close(reading)


@pytest.fixture
def scripts(alive: Path) -> dict[str, Any]:
    """Options of the plugin with programs that wait."""
    texts = {
        "polite": "trap 'echo bye; exit 5' TERM; echo up; sleep 3600 & wait",
        "deaf": "trap 'echo asked' TERM; echo up; (trap '' TERM; sleep 3600) & while :; do wait; done",
        "lonely": "echo up; exec sleep 3600",
    }
    return {
        "types": {
            name: {"command": ["/bin/sh", "-c", f"exec 9>{alive}; {text}"]} for name, text in texts.items()
        }
    }


def wait_for_line(child: Child, run: int, line: str) -> None:
    while line not in child.lines(run):
        child._read()


def started(child: Child, type: str, **fields: Any) -> int:
    run = child.start(type, **fields)
    wait_for_line(child, run, "up")
    return run


def test_what_a_program_left_behind_is_killed_with_the_attempt(alive: Path) -> None:
    outcome = ran(f"sleep 3600 >{alive} 2>&1 & exit 0")

    wait_for_all_dead(alive)
    assert outcome.kind == "completed"


@pytest.mark.parametrize(
    ("type", "exit_code", "number"),
    [
        pytest.param("polite", 5, None, id="asked by SIGTERM first"),
        pytest.param("deaf", None, signal.SIGKILL, id="killed before the grace is over"),
    ],
)
def test_a_cancel_ends_the_program_and_its_group(
    scripts: dict[str, Any], alive: Path, type: str, exit_code: int | None, number: int | None
) -> None:
    with Child("taskd.builtin.command", [type], options=scripts, grace_s=0.2) as child:
        run = started(child, type)
        child.send(Cancel(run, "cancelled"))

        finished = child.finished(run)

        assert (finished.outcome, finished.exit_code, finished.signal) == ("cancelled", exit_code, number)
        wait_for_all_dead(alive)
        assert child.stop() == 0


def test_a_timeout_ends_the_program(scripts: dict[str, Any]) -> None:
    with Child("taskd.builtin.command", ["deaf"], options=scripts, grace_s=0.2) as child:
        run = started(child, "deaf", timeout_s=1.0)

        assert child.finished(run).outcome == "timeout"


def test_a_second_cancel_does_not_wait_for_the_grace(scripts: dict[str, Any]) -> None:
    with Child("taskd.builtin.command", ["deaf"], options=scripts, grace_s=3600) as child:
        run = started(child, "deaf")
        child.send(Cancel(run, "cancelled"))
        wait_for_line(child, run, "asked")
        child.send(Cancel(run, "interrupted"))

        assert child.finished(run).outcome == "cancelled"


def test_the_program_dies_with_the_child(scripts: dict[str, Any], alive: Path) -> None:
    with Child("taskd.builtin.command", ["lonely"], options=scripts) as child:
        started(child, "lonely")

        child.process.kill()

        wait_for_all_dead(alive)
