"""The public plugin API: what a declaration makes, and what the context lets a handler do."""

from __future__ import annotations

import asyncio
import functools
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict

import msgspec
import pluggy
import pytest

import taskd.plugin
from taskd.child.load import NotLoaded, handler_of
from taskd.plugin import Context, Fail, Hooks, JobType, RetryLater, Secret, Snooze, hookimpl, job, seconds

if TYPE_CHECKING:
    from nowhere import Elsewhere  # type: ignore[import-not-found]


class Inner(msgspec.Struct):
    id: int


class Order(msgspec.Struct):
    """An order."""

    items: list[Inner]
    token: Annotated[str, Secret] = ""


@dataclass
class Point:
    x: int


class Dict(TypedDict):
    x: int


class Tree(msgspec.Struct):
    leaves: list[Tree] = []


class PydanticLike:
    """Has the two methods by which taskd knows a pydantic model."""

    def __init__(self, x: int) -> None:
        self.x = x

    @classmethod
    def model_json_schema(cls) -> dict[str, Any]:
        return {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}

    @classmethod
    def model_validate_json(cls, raw: bytes) -> PydanticLike:
        x = msgspec.json.decode(raw)["x"]
        if not isinstance(x, int):
            raise ValueError(f"x is {x!r}")
        return cls(x)


def schema(run: Any, **options: Any) -> dict[str, Any]:
    return handler_of(JobType(name="t", run=run, **options)).info.schema


def test_the_exported_names_are_the_documented_ones() -> None:
    assert {
        "API_VERSION",
        "Context",
        "Fail",
        "Hooks",
        "JobType",
        "RetryLater",
        "Snooze",
        "hookimpl",
        "job",
    } <= set(taskd.plugin.__all__)


async def signature(
    name: str,
    kind: Literal["a", "b"] = "a",
    at: datetime | None = None,
    tags: list[str] = [],  # noqa: B006
    limit: Annotated[int, msgspec.Meta(ge=1, description="how many")] = 5,
    *,
    ctx: Elsewhere,
) -> Elsewhere: ...


def test_a_signature_becomes_a_closed_schema_and_the_types_of_context_and_result_do_not_matter() -> None:
    assert schema(signature) == {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "kind": {"enum": ["a", "b"], "default": "a"},
            "at": {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None},
            "tags": {"type": "array", "items": {"type": "string"}, "default": []},
            "limit": {"type": "integer", "minimum": 1, "description": "how many", "default": 5},
        },
        "required": ["name"],
        "additionalProperties": False,
    }


async def whole(order: Order) -> None: ...


def test_a_single_class_takes_the_whole_payload_and_brings_its_parts() -> None:
    info = handler_of(JobType(name="t", run=whole)).info

    assert info.schema["additionalProperties"] is False
    properties: Any = info.schema["properties"]
    assert properties["items"] == {"type": "array", "items": {"$ref": "#/$defs/Inner"}}
    assert "Order" not in str(info.schema["$defs"])
    assert info.secrets == ("token",)


async def tree(root: Tree) -> None: ...


def test_a_class_that_holds_itself_keeps_its_definition() -> None:
    found = schema(tree)

    assert found["properties"]["leaves"]["items"] == {"$ref": "#/$defs/Tree"}
    assert "Tree" in found["$defs"]


@pytest.mark.parametrize(
    ("payload", "raw", "value"),
    [
        pytest.param(Point, b'{"x":1}', Point(1), id="dataclass"),
        pytest.param(Dict, b'{"x":1}', {"x": 1}, id="TypedDict"),
        pytest.param(dict, b'{"y":[1]}', {"y": [1]}, id="any object"),
        pytest.param({"properties": {"x": {"type": "integer"}}}, b'{"x":1}', {"x": 1}, id="JSON Schema"),
    ],
)
def test_payload_classes(payload: Any, raw: bytes, value: object) -> None:
    async def run(given: Any) -> None: ...

    handler = handler_of(JobType(name="t", run=run, payload=payload))

    assert handler.shape.decode(raw) == ((value,), {})
    assert handler.info.schema["type"] == "object"


def test_a_pydantic_model_is_known_by_its_methods_and_its_errors_show_no_input() -> None:
    async def run(given: Any) -> None: ...

    handler = handler_of(JobType(name="t", run=run, payload=PydanticLike))

    [model], _ = handler.shape.decode(b'{"x":1}')
    assert isinstance(model, PydanticLike)
    assert model.x == 1
    assert handler.info.schema["additionalProperties"] is False
    with pytest.raises(ValueError, match="unknown member 'y'"):
        handler.shape.decode(b'{"x":1,"y":2}')
    with pytest.raises(ValueError, match="does not fit") as refused:
        handler.shape.decode(b'{"x":"hunter2"}')
    assert "hunter2" not in str(refused.value)


class Client:
    async def send(self, to: str) -> None: ...

    async def __call__(self, to: str) -> None: ...


@pytest.mark.parametrize(
    "run",
    [
        pytest.param(Client().send, id="a bound method"),
        pytest.param(Client(), id="an object that can be called"),
        pytest.param(functools.partial(signature, "x", "a", None, [], 1, ctx=None), id="a partial", marks=[]),
    ],
)
def test_anything_that_can_be_called_is_a_handler(run: Any) -> None:
    assert handler_of(JobType(name="t", run=run)).info.isolation == "async"


def positional(a: int, /) -> None: ...
def star(*args: int) -> None: ...
def double_star(**kwargs: int) -> None: ...
def untyped(a) -> None: ...  # type: ignore[no-untyped-def]
def unresolved(a: Elsewhere) -> None: ...
def unsupported(a: asyncio.Future[int]) -> None: ...


@pytest.mark.parametrize("run", [positional, star, double_star, untyped, unresolved, unsupported])
def test_a_signature_that_json_can_not_fill_is_refused_by_the_name_of_the_type(run: Any) -> None:
    with pytest.raises(NotLoaded, match="job type t"):
        handler_of(JobType(name="t", run=run))


def test_a_payload_that_is_no_object_is_refused() -> None:
    with pytest.raises(NotLoaded, match="must be an object"):
        handler_of(JobType(name="t", run=signature, payload=list[int]))


def test_async_def_shares_a_process_and_def_does_not() -> None:
    assert handler_of(JobType(name="t", run=positional, payload=dict)).info.isolation == "process"
    assert handler_of(JobType(name="t", run=whole)).info.isolation == "async"
    assert handler_of(JobType(name="t", run=whole, isolation="process")).info.isolation == "process"


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"name": "Greet"}, id="a name with a capital"),
        pytest.param({"name": "greet\n"}, id="a name with a line break"),
        pytest.param({"timeout": "10"}, id="a time without a unit"),
        pytest.param({"timeout": "0s"}, id="no time at all"),
        pytest.param({"timeout": timedelta(seconds=-1)}, id="a time before now"),
        pytest.param({"rate": "2"}, id="a rate without a span"),
        pytest.param({"rate": 0}, id="a rate of nothing"),
        pytest.param({"isolation": "thread"}, id="an unknown isolation"),
        pytest.param({"run": positional, "isolation": "async"}, id="a plain def would block its neighbours"),
        pytest.param({"concurrency": 0}, id="no slot"),
        pytest.param({"max_memory": "256MB"}, id="a size that is none"),
        pytest.param({"retry": {"attempts": 3}}, id="a misspelt member of retry"),
        pytest.param({"retry": {"backoff": "random"}}, id="an unknown curve"),
    ],
)
def test_a_declaration_that_can_not_be_is_refused_at_once(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="job type"):
        JobType(**{"name": "greet", "run": whole, **options})


def test_times_rates_and_sizes_may_be_written_as_in_the_configuration() -> None:
    info = handler_of(
        JobType(
            name="t",
            run=whole,
            timeout=timedelta(minutes=2),
            grace="250ms",
            rate="90/m",
            max_memory="256MiB",
            retention="7d",
            retry={"max_attempts": 5, "backoff": "fixed", "backoff_base": "10s", "delays": ["1s", 2]},
        )
    ).info

    assert (info.timeout, info.grace, info.rate) == (120.0, 0.25, 1.5)
    assert (info.max_memory, info.retention) == (256 << 20, 7 * 86400.0)
    assert (info.retry.max_attempts, info.retry.backoff_base, info.retry.delays) == (5, 10.0, (1.0, 2.0))


@pytest.mark.parametrize(
    ("doc", "description", "example"),
    [
        pytest.param(None, "", None, id="none"),
        pytest.param("Say hello.", "Say hello.", None, id="a sentence"),
        pytest.param('Say.\n\nExample: {"a": 1}', "Say.", {"a": 1}, id="an example behind its title"),
        pytest.param(
            'Say.\n\nExample:\n    {\n     "a": 1}\n\nMore.', "Say.\n\nMore.", {"a": 1}, id="in the middle"
        ),
        pytest.param('Example: {"a": 1}', "", {"a": 1}, id="only an example"),
        pytest.param(
            "Say.\n\nExample: say hello", "Say.\n\nExample: say hello", None, id="an example in words"
        ),
    ],
)
def test_description_and_example_come_from_the_docstring(
    doc: str | None, description: str, example: dict[str, Any] | None
) -> None:
    async def run(a: int = 0) -> None: ...

    run.__doc__ = doc
    info = handler_of(JobType(name="t", run=run)).info

    assert (info.description, info.example) == (description, example)


def test_a_decorated_handler_can_still_be_called() -> None:
    @job("double")
    def double(x: int) -> int:
        return 2 * x

    assert double(x=4) == 8
    assert double.name == "double"


@pytest.mark.parametrize(
    ("delay", "expected"),
    [("90s", 90.0), (2, 2.0), (2.5, 2.5), (timedelta(hours=1), 3600.0), ("3000d", 31_536_000.0)],
)
def test_delays_are_texts_numbers_or_timedeltas_of_a_year_at_most(delay: Any, expected: float) -> None:
    assert RetryLater(delay).delay_s == Snooze(delay).delay_s == expected


@pytest.mark.parametrize(
    "delay", ["soon", -1, float("nan"), float("inf"), timedelta(seconds=-1), True, b"1s"]
)
def test_a_delay_that_is_none_is_refused(delay: Any) -> None:
    with pytest.raises(ValueError, match="duration"):
        seconds(delay)


def test_retry_later_without_a_delay_leaves_it_to_the_policy() -> None:
    assert RetryLater(reason="busy").delay_s is None
    assert Fail("no").reason == "no"


class Lines:
    """A sink that keeps what it gets."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []

    def line(self, ctx: Context, level: str, text: str) -> None:
        self.lines.append((level, text))

    def progress(self, ctx: Context, percent: float, message: str) -> None:
        self.lines.append((str(percent), message))


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ctx(clock: Clock) -> Context:
    return Context(
        job_id="0190",
        type="t",
        attempt=1,
        max_attempts=3,
        timeout_s=10.0,
        grace=5.0,
        options={},
        resources=None,
        sink=Lines(),
        clock=clock,
        started=1_800_000_000.0,
    )


def test_the_context_counts_down_to_its_deadline(ctx: Context, clock: Clock) -> None:
    assert ctx.deadline == datetime.fromtimestamp(1_800_000_010, UTC)
    assert ctx.remaining() == 10.0
    ctx.check()

    clock.now += 10
    assert ctx.remaining() == 0.0
    with pytest.raises(asyncio.CancelledError):
        ctx.check()
    assert ctx.cancelled


def test_the_idempotency_key_is_made_of_the_job_alone(ctx: Context) -> None:
    assert ctx.idempotency_key == "taskd/0190"


@pytest.mark.parametrize("percent", [-1, 100.1, float("nan")])
def test_progress_has_bounds(ctx: Context, percent: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 100"):
        ctx.progress(percent)


def test_a_line_whose_arguments_do_not_fit_harms_nobody(
    ctx: Context, capsys: pytest.CaptureFixture[str]
) -> None:
    ctx.log.info("%d", "no number")

    assert ctx._sink.lines == []  # type: ignore[attr-defined]
    assert "no number" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("type", "payload", "options", "problem"),
    [
        pytest.param("Greet", {}, {}, "type", id="a name that can't be"),
        pytest.param("taskd.notify", {}, {}, "reserved", id="a name of ours"),
        pytest.param("greet", [], {}, "payload", id="no object"),
        pytest.param("greet", {"x": object()}, {}, "no JSON form", id="no JSON"),
        pytest.param("greet", {"x": "y" * (1 << 20)}, {}, "more than", id="too large"),
        pytest.param("greet", {}, {"prio": 1}, "prio", id="an unknown option"),
        pytest.param("greet", {}, {"priority": 101}, "priority", id="a value beyond its range"),
        pytest.param("greet", {}, {"delay": 1, "run_at": "2027-01-15T08:00:00Z"}, "beside", id="two times"),
        pytest.param("greet", {}, {"run_at": datetime(2027, 1, 15)}, "run_at", id="a time without a zone"),
    ],
)
def test_submit_is_checked_at_the_call(
    ctx: Context, type: str, payload: Any, options: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ValueError, match=f"submit: .*{problem}"):
        ctx.submit(type, payload, **options)

    assert not ctx._submits


def test_submit_keeps_the_body_as_it_is_sent(ctx: Context) -> None:
    ctx.submit("greet", {"point": Point(1)}, run_at=datetime(2027, 1, 15, 9, tzinfo=UTC))

    assert ctx._submits == [b'{"type":"greet","payload":{"point":{"x":1}},"run_at":"2027-01-15T09:00:00Z"}']


def test_submits_are_bounded(ctx: Context) -> None:
    for _ in range(1000):
        ctx.submit("greet", {})

    with pytest.raises(ValueError, match="at most 1000"):
        ctx.submit("greet", {})


def test_pluggy_takes_the_hooks_and_refuses_what_is_misspelt() -> None:
    class Good:
        @hookimpl
        def taskd_job_types(self) -> list[JobType]:
            return []

    class Misspelt:
        @hookimpl
        def taskd_job_type(self) -> list[JobType]:
            return []

    manager = pluggy.PluginManager("taskd")
    manager.add_hookspecs(Hooks)
    manager.register(Good())
    manager.check_pending()
    manager.register(Misspelt())

    with pytest.raises(pluggy.PluginValidationError, match="taskd_job_type"):
        manager.check_pending()
