"""Job types that run a program, written in YAML and without code.

    job_types:
      resize:
        command: [/usr/bin/convert, "{file}", -resize, "{size}", out.png]
        params: {file: "[a-z0-9]+\\\\.png", size: "[0-9]{1,4}x[0-9]{1,4}"}

The payload is the parameters. Each is put into its place within one argument: there is no shell, the
program's name takes no parameter, and no value may begin with `-`, so that none can become an option.

The program leads a process group of its own, which is killed when the attempt ends. It dies with this
child, too: the kernel is asked for that between fork and exec (`preexec_fn`). The warning about threads
in Python's manual is about locks that another thread may hold; between fork and exec nothing happens
here but one system call that was bound before. What the program itself has started is then found by
`TASKD_NODE` in its environment. The other way, a launcher in Python, would cost each job 15 ms.

Exit codes: those of `success_codes` complete the job, 75 (EX_TEMPFAIL of sysexits.h) runs it again by
the retry policy, those of `no_retry_codes` fail it for good, any other code or signal is an error.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import re
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import jsonschema_rs
import msgspec

from taskd.plugin import Context, Fail, JobType, RetryLater, hookimpl

MAX_OUTPUT = 1 << 20
"""Bytes of each of the two outputs that are kept; what follows is read and dropped."""

MAX_VALUE = 4096
"""Characters of one parameter."""

EX_TEMPFAIL = 75

_LINE = 16 * 1024
_STUCK_S = 1.0
_KEPT = ("PATH", "HOME", "LANG", "TZ", "TMPDIR")
_MARKS = ("TASKD_NODE", "TASKD_LOCK")  # leftovers are found by them: no option may change them
_NAME = r"[A-Za-z_][A-Za-z0-9_]*"
_PLACE = re.compile(rf"\{{\{{({_NAME})\}}\}}|\{{({_NAME})\}}")
_TEXT_TYPES = ("string", "integer", "number", "boolean")
_PR_SET_PDEATHSIG = 1

# Bound here, so that nothing has to be looked up between fork and exec.
_prctl = ctypes.CDLL(None, use_errno=False).prctl
_arguments = (
    ctypes.c_int(_PR_SET_PDEATHSIG),
    ctypes.c_ulong(signal.SIGKILL),
    ctypes.c_ulong(0),
    ctypes.c_ulong(0),
    ctypes.c_ulong(0),
)


class CommandFailed(Exception):
    """The program ended with a code that means failure, or by a signal."""

    def __init__(self, message: str, *, exit_code: int | None, signal: int | None) -> None:
        self.exit_code = exit_code
        self.signal = signal
        super().__init__(message)


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One command type as the configuration says it."""

    command: list[str]
    params: dict[str, str | dict[str, Any]] = {}
    """What each parameter must match in full, or its JSON Schema. One with a `default` may be left out."""
    success_codes: tuple[int, ...] = (0,)
    no_retry_codes: tuple[int, ...] = ()
    env: dict[str, str] = {}
    """Added to PATH, HOME, LANG, TZ, TMPDIR and the job's own TASKD_* variables."""
    cwd: str = "/"
    timeout: str | None = None
    grace: str | None = None
    description: str = ""


class AllOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The options of this plugin: the command types by name."""

    types: dict[str, Options] = {}


@hookimpl
def taskd_options_schema() -> type:
    """Take the command types by name."""
    return AllOptions


@hookimpl
def taskd_job_types(options: Mapping[str, object]) -> Sequence[JobType]:
    """Make a job type of each command."""
    wanted = msgspec.convert(dict(options), AllOptions)
    return [command_type(name, command, os.environ) for name, command in wanted.types.items()]


def command_type(name: str, options: Options, environ: Mapping[str, str]) -> JobType:
    """Return the job type that runs the program of `options`.

    `environ` is where the few variables come from that a program gets beside its own.

    Raises:
        ValueError: the command can't be; the message names the type and the key.
    """
    command = Command(name, options, environ)
    return JobType(
        name=name,
        run=command.run,
        payload=command.schema,
        description=options.description or f"Runs {options.command[0]}.",
        timeout=options.timeout,
        grace=options.grace,
    )


class Command:
    """One command type: checked once, run for each job."""

    def __init__(self, name: str, options: Options, environ: Mapping[str, str]) -> None:
        self._options = options
        self._params = {key: _param(name, key, rule) for key, rule in options.params.items()}
        self._argv = _checked(name, options.command, self._params)
        if not os.path.isabs(options.cwd):  # noqa: PTH117 - a text from the configuration
            raise ValueError(f"types.{name}.cwd: {options.cwd} is no absolute path")
        kept = {key: value for key, value in environ.items() if key in _KEPT or key.startswith("LC_")}
        marks = {key: environ[key] for key in _MARKS if key in environ}
        self._env = {**kept, **options.env, **marks}
        required = [key for key, rule in self._params.items() if "default" not in rule]
        self.schema: dict[str, object] = {
            "type": "object",
            "properties": self._params,
            "required": required,
            "additionalProperties": False,
        }

    def argv(self, payload: Mapping[str, Any]) -> list[str]:
        """Return the arguments for `payload`, which fits the schema.

        Raises:
            Fail: a value would become an option; the schema refuses those already.
        """
        values = {key: _text(payload.get(key, rule.get("default"))) for key, rule in self._params.items()}
        for key, value in values.items():
            if value.startswith("-"):
                raise Fail(f"parameter {key} begins with -")
        return [
            _PLACE.sub(lambda place: f"{{{place[1]}}}" if place[1] else values[place[2]], argument)
            for argument in self._argv
        ]

    async def run(self, payload: dict[str, Any], *, ctx: Context) -> object:
        """Run the program and return what it printed, if that is one JSON value."""
        env = {
            **self._env,
            "TASKD_JOB_ID": ctx.job_id,
            "TASKD_ATTEMPT": str(ctx.attempt),
            "TASKD_IDEMPOTENCY_KEY": ctx.idempotency_key,
        }
        program = _Program(self.argv(payload), env, self._options.cwd, ctx)
        asked: asyncio.CancelledError | None = None
        try:
            try:
                await program.ended()
            except asyncio.CancelledError as error:
                asked = error
                await program.stop(_patience(ctx.grace))
            await program.kill()
        finally:
            program.close()
        if asked is not None:
            asked.exit_code, asked.signal = program.status()  # type: ignore[attr-defined]
            raise asked
        return self._verdict(program)

    def _verdict(self, program: _Program) -> object:
        code, number = program.status()
        if code in self._options.success_codes:
            return program.result()
        how = f"exit code {code}" if code is not None else f"killed by {_signal_name(number)}"
        last = program.last_words()
        reason = f"{how}: {last}" if last else how
        failure: Exception = CommandFailed(reason, exit_code=code, signal=number)
        if code in self._options.no_retry_codes:
            failure = Fail(reason)
        elif code == EX_TEMPFAIL:
            failure = RetryLater(reason=reason)
        failure.exit_code = code  # type: ignore[attr-defined]
        raise failure


class _Program:
    """One running program with its process group and outputs; owned by the task of its job."""

    def __init__(self, argv: Sequence[str], env: Mapping[str, str], cwd: str, ctx: Context) -> None:
        self._loop = asyncio.get_running_loop()
        self._process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=env,
            cwd=cwd,
            process_group=0,
            preexec_fn=_die_with_parent,
        )
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._out = _Output(self._loop, self._process.stdout.fileno(), ctx.log.info)
        self._err = _Output(self._loop, self._process.stderr.fileno(), ctx.log.warning)
        self._gone = asyncio.Event()
        self._pidfd = os.pidfd_open(self._process.pid)
        self._loop.add_reader(self._pidfd, self._seen)

    async def ended(self) -> None:
        """Wait until the program has ended; what it started may still run."""
        await self._gone.wait()

    async def stop(self, patience_s: float) -> None:
        """Ask the group to end, and kill it after `patience_s` seconds, or when asked a second time."""
        self._signal(signal.SIGTERM)
        with suppress(TimeoutError, asyncio.CancelledError):
            await asyncio.wait_for(self._gone.wait(), patience_s)

    async def kill(self) -> None:
        """Kill what is left of the group and see its leader end; one stuck in the kernel is left there."""
        self._signal(signal.SIGKILL)
        with suppress(TimeoutError, asyncio.CancelledError):
            await asyncio.wait_for(self._gone.wait(), _STUCK_S)

    def close(self) -> None:
        """Keep what the program has printed last and give everything back; the group is dead after it."""
        # Its number can't be taken by others before this: the leader has not been waited for.
        self._signal(signal.SIGKILL)
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._out.close()
        self._err.close()
        self._process.poll()
        for stream in (self._process.stdout, self._process.stderr):
            if stream is not None:
                stream.close()

    def status(self) -> tuple[int | None, int | None]:
        """Return exit code and signal; one is None, both are while the program can't be killed."""
        code = self._process.returncode
        if code is None:
            return None, None
        return (code, None) if code >= 0 else (None, -code)

    def result(self) -> object:
        """Return the standard output as JSON; None when it is no JSON value or was cut."""
        if self._out.cut:
            return None
        try:
            return msgspec.json.decode(bytes(self._out.kept))
        except (msgspec.DecodeError, RecursionError):
            return None

    def last_words(self) -> str:
        """Return the last line of the error output, for the error text."""
        return self._err.last_line[-500:]

    def _seen(self) -> None:
        self._loop.remove_reader(self._pidfd)
        self._gone.set()

    def _signal(self, number: int) -> None:
        if self._process.returncode is None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, number)


class _Output:
    """Reads one output as it comes: lines go to the job's log, the first MiB is kept."""

    def __init__(self, loop: asyncio.AbstractEventLoop, number: int, log: Callable[[str, str], None]) -> None:
        self.kept = bytearray()
        self.cut = False
        self.last_line = ""
        self._loop = loop
        self._number = number
        self._log = log
        self._rest = b""
        os.set_blocking(number, False)
        loop.add_reader(number, self._read)

    def close(self) -> None:
        """Take what is in the pipe and stop; a process that escaped the group may hold the other end."""
        for _ in range(64):  # the kernel holds a MiB at most
            if not self._read():
                break
        self._loop.remove_reader(self._number)
        if self._rest:
            self._line(self._rest)

    def _read(self) -> bool:
        try:
            data = os.read(self._number, 65536)
        except BlockingIOError:
            return False
        if not data:
            self._loop.remove_reader(self._number)
            return False
        room = MAX_OUTPUT - len(self.kept)
        if len(data) > room and not self.cut:
            self.cut = True
            self._log("%s", f"taskd: output after the first {MAX_OUTPUT} bytes is dropped")
        self.kept += data[:room]
        self._rest = self._lines(self._rest + data[:room])
        return True

    def _lines(self, data: bytes) -> bytes:
        *lines, rest = data.split(b"\n")
        for line in lines:
            self._line(line)
        while len(rest) > _LINE:
            self._line(rest[:_LINE])
            rest = rest[_LINE:]
        return rest

    def _line(self, line: bytes) -> None:
        text = line.decode("utf-8", "replace").rstrip("\r")
        if text.strip():
            self.last_line = text
        self._log("%s", text)


def _param(name: str, key: str, rule: str | dict[str, Any]) -> dict[str, Any]:
    """Return the JSON Schema of one parameter; whatever the rule says, no value begins with `-`."""
    where = f"types.{name}.params.{key}"
    if not re.fullmatch(_NAME, key):
        raise ValueError(f"{where}: a parameter's name is letters, digits and _")
    if isinstance(rule, str):
        _compile(where, {"pattern": rule})  # alone first: brackets in it must not close ours
        # JSON Schema searches a pattern anywhere; $ is the very end to it, not the last line break.
        schema: dict[str, Any] = {"type": "string", "pattern": f"^(?:{rule})$"}
    else:
        schema = dict(rule)
    kind = schema.get("type")
    if kind not in _TEXT_TYPES:
        raise ValueError(f"{where}: its type must be one of {', '.join(_TEXT_TYPES)}")
    if kind == "string":
        schema.setdefault("maxLength", MAX_VALUE)
        schema["allOf"] = [*schema.get("allOf", ()), {"not": {"pattern": "^-"}}]
    elif kind in ("integer", "number"):
        schema["allOf"] = [*schema.get("allOf", ()), {"minimum": 0}]
    _compile(where, schema)
    return schema


def _compile(where: str, schema: dict[str, Any]) -> None:
    try:
        jsonschema_rs.validator_for(schema)
    except ValueError as error:
        raise ValueError(f"{where}: {str(error).splitlines()[0]}") from None


def _checked(name: str, command: Sequence[str], params: Mapping[str, object]) -> tuple[str, ...]:
    where = f"types.{name}.command"
    if not command:
        raise ValueError(f"{where}: names no program")
    if not command[0].startswith("/"):
        raise ValueError(f"{where}: {command[0]} is no absolute path of a program")
    if _PLACE.search(command[0]):
        raise ValueError(f"{where}: the program's name takes no parameter")
    for argument in command:
        if "\0" in argument:
            raise ValueError(f"{where}: an argument has the character U+0000")
        for place in _PLACE.finditer(argument):
            if place[2] is None:
                continue
            if place[2] not in params:
                raise ValueError(f"{where}: {place[0]} is not in params; add it, or double its braces")
            if argument.startswith("-") and "=" not in argument[: place.start()]:
                raise ValueError(
                    f"{where}: {argument} takes a parameter within an option's name; put = before it"
                )
    return tuple(command)


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)


def _patience(grace_s: float) -> float:
    """Return how long the program may take to end: the child itself is killed after `grace_s`."""
    return max(grace_s - 1.0, grace_s / 2)


def _signal_name(number: int | None) -> str:
    try:
        return signal.Signals(number or 0).name
    except ValueError:
        return f"signal {number}"


def _die_with_parent() -> None:
    _prctl(*_arguments)
