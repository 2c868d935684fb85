"""What supervisor and job children say to each other, and how it goes over a pipe.

A *frame* is four bytes of length (big endian) and a JSON array of messages: one write carries all that
gathered since the last, so the cost of a hop is paid per batch and not per job. JSON, because a child
runs other people's code and must never be able to make its supervisor build objects (no pickle).
Payloads and results are carried as raw JSON and are not parsed on the way.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from taskd.model.jobtype import TypeInfo

MAX_FRAME = 64 * 1024 * 1024
"""Bytes; a longer frame means the other side is broken, and its process is ended."""


class Plugin(msgspec.Struct, frozen=True, kw_only=True):
    """A plugin that a child loads. Exactly one of `module` and `name` (an entry point) is set.

    `options` is the plugin's own `config:`, secrets resolved; no other child gets it.
    """

    module: str | None = None
    name: str | None = None
    options: dict[str, object] = {}


class TypeSetup(msgspec.Struct, frozen=True, kw_only=True):
    """How one job type runs in this child, after YAML has overridden the author."""

    type: str
    handler: str
    """Name of the job type of a plugin whose code runs; differs from `type` for a second lane."""
    grace_s: float = 5.0
    options: dict[str, object] = {}


class Setup(msgspec.Struct, frozen=True, kw_only=True, tag="setup", tag_field="kind", array_like=True):
    """The first message to a child: what to load and how to run it."""

    node: str
    child: int
    plugins: list[Plugin]
    types: list[TypeSetup]
    slots: int
    """Jobs at once; 1 in a child of isolation `process`."""
    isolation: str
    result_bytes: int
    error_bytes: int
    log_lines: int
    max_memory: int | None = None


class Start(msgspec.Struct, frozen=True, tag="start", tag_field="kind", array_like=True):
    """Run one job. `run` is the supervisor's handle for it, unique in the life of the child."""

    run: int
    type: str
    job_id: str
    attempt: int
    max_attempts: int
    timeout_s: float
    client: str
    payload: msgspec.Raw


class Cancel(msgspec.Struct, frozen=True, tag="cancel", tag_field="kind", array_like=True):
    """Ask a running job to stop, `reason` is a cause; a job not yet started is dropped unrun."""

    run: int
    reason: str


class Stop(msgspec.Struct, frozen=True, tag="stop", tag_field="kind", array_like=True):
    """Take no more jobs, finish the running ones, answer unstarted ones with `dropped`, exit 0."""


class Ready(msgspec.Struct, frozen=True, tag="ready", tag_field="kind", array_like=True):
    """The child has loaded its plugins, run `taskd_child_started` and takes jobs."""

    pid: int


class Broken(msgspec.Struct, frozen=True, tag="broken", tag_field="kind", array_like=True):
    """The child can't load its plugins; it exits after saying why."""

    problem: str


class Started(msgspec.Struct, frozen=True, tag="started", tag_field="kind", array_like=True):
    """The handlers of these runs are about to be called."""

    runs: list[int]


class Log(msgspec.Struct, frozen=True, tag="log", tag_field="kind", array_like=True):
    """A line that the handler wrote; `at` is Unix time in seconds."""

    run: int
    at: float
    level: str
    text: str


class Progress(msgspec.Struct, frozen=True, tag="progress", tag_field="kind", array_like=True):
    """How far the handler says it is."""

    run: int
    percent: float
    message: str


class Completed(msgspec.Struct, frozen=True, tag="completed", tag_field="kind", array_like=True):
    """Runs that completed and left nothing but a small result, side by side: most runs end so."""

    runs: list[int]
    results: list[msgspec.Raw]


class Finished(msgspec.Struct, frozen=True, tag="finished", tag_field="kind", array_like=True):
    """How a run ended. Sent for each `Start` that no `Completed` names, also for jobs that never started.

    `outcome`: completed, error, timeout, fail, retry_later, snoozed, cancelled, invalid_payload or
    dropped (not started, goes back). `started` says whether the handler was called.
    """

    run: int
    outcome: str
    started: bool = True
    result: msgspec.Raw = msgspec.Raw(b"null")
    """Raw alone: msgspec can't decode a union with it."""
    error: str | None = None
    delay_s: float | None = None
    exit_code: int | None = None
    signal: int | None = None
    cpu_s: float | None = None
    max_rss: int | None = None
    submits: list[msgspec.Raw] = []
    """Jobs that the handler made with `ctx.submit()`, each as a submit body; stored with the completion."""


ToChild = Setup | Start | Cancel | Stop
ToSupervisor = Ready | Broken | Started | Log | Progress | Completed | Finished

_encoder = msgspec.json.Encoder()


def frame(messages: Iterable[msgspec.Struct]) -> bytes:
    """Return one frame that carries `messages` in order."""
    body = _encoder.encode(list(messages))
    return len(body).to_bytes(4, "big") + body


class BrokenFrame(ValueError):
    """The other side sent what is no frame; nothing after it can be trusted."""


class Reader:
    """Cuts a stream of bytes into messages; owned by the one task that reads the pipe."""

    def __init__(self, kind: object) -> None:
        """`kind` is `ToChild` or `ToSupervisor`: what may come out of this pipe."""
        self._decoder = msgspec.json.Decoder(list[kind])  # type: ignore[valid-type]
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[object]:
        """Return the messages that are complete now, in order; keeps the rest for the next call.

        Raises:
            BrokenFrame: a length beyond `MAX_FRAME`, no JSON, JSON that is nested too deep to be skipped
                (about 1000 levels), or a message that is not of `kind`.
        """
        self._buffer += data
        messages: list[object] = []
        start, end = 0, len(self._buffer)
        while end - start >= 4:
            size = int.from_bytes(self._buffer[start : start + 4], "big")
            if size > MAX_FRAME:
                raise BrokenFrame(f"a frame of {size} bytes is longer than {MAX_FRAME}")
            if end - start - 4 < size:
                break
            # Raw members point into the bytes they were decoded from: give them bytes of their own.
            body = bytes(self._buffer[start + 4 : start + 4 + size])
            try:
                messages += self._decoder.decode(body)
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
                raise BrokenFrame(str(error)) from error
            start += 4 + size
        del self._buffer[:start]
        return messages


class Describe(msgspec.Struct, frozen=True, kw_only=True):
    """What `python -m taskd.child --describe` reads from its standard input."""

    plugins: list[Plugin]


class PluginProblem(msgspec.Struct, frozen=True, kw_only=True):
    """What is wrong with plugin number `plugin` of a `Describe`.

    `path` is the place inside the plugin's YAML entry: `module`, `name`, `config`, `config.api_key`.
    `missing` tells that required options are absent: that stops a start only for a plugin that YAML names.
    """

    plugin: int
    path: str
    message: str
    missing: bool = False


class Described(msgspec.Struct, frozen=True, kw_only=True):
    """What `--describe` writes: all types of the plugins that could be loaded, and every problem."""

    types: list[TypeInfo]
    problems: list[PluginProblem]
