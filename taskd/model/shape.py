"""The shape of a payload: its JSON Schema, and how JSON text becomes what a handler is called with.

One `Shape` is made for each job type when its plugin is loaded, from the handler's signature or from a
payload class. Schema and decoder come from the same declaration, so that what the door accepts is what
the handler gets. Pure: msgspec does the work, classes with pydantic's methods are taken by their shape.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace

import msgspec


class BadPayload(ValueError):
    """A payload that does not fit the shape; the message names the place and no value."""


class BadShape(TypeError):
    """A declaration that no shape can be made from; the message is meant for the plugin's author."""


@dataclass(frozen=True, slots=True)
class Shape:
    """How one job type's payload looks and is decoded.

    `decode` takes the raw JSON and returns the call's positional and keyword arguments; it raises
    `BadPayload`. `secrets` are the top-level members that the author marked `Secret`.
    """

    schema: dict[str, object]
    decode: Callable[[bytes | memoryview], tuple[tuple[object, ...], dict[str, object]]]
    secrets: tuple[str, ...]


def of_signature(name: str, run: Callable[..., object], skip: str | None) -> Shape:
    """Return the shape of a handler whose parameters are the payload.

    A single parameter whose type is a Struct, a dataclass or a pydantic model takes the whole payload.
    `skip` is the parameter that takes the context.

    Raises:
        BadShape: a parameter without a type, `*args`, or an annotation that can't be resolved.
    """
    parameters = [p for p in inspect.signature(run).parameters.values() if p.name != skip]
    hints = _hints(name, run, parameters)
    fields: list[tuple[str, object, object]] = []
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise BadShape(
                f"{name}: {parameter} can't be filled from JSON; name each parameter, or give payload="
            )
        known = parameter.name
        if known not in hints:
            raise BadShape(f"{name}: parameter {known} has no type; write one, like {known}: str")
        fields.append((known, hints[known], parameter.default))
    if len(fields) == 1 and _is_class(fields[0][1]) and fields[0][2] is inspect.Parameter.empty:
        return of_class(name, fields[0][1])
    struct = _struct(name, fields)
    names = tuple(field[0] for field in fields)
    decode = _decoder(struct)

    def arguments(raw: bytes | memoryview) -> tuple[tuple[object, ...], dict[str, object]]:
        value = decode(raw)
        return (), {field: getattr(value, field) for field in names}

    schema = _schema(name, struct)
    return Shape(schema, arguments, _secrets(schema))


def of_class(name: str, kind: object) -> Shape:
    """Return the shape of a handler that takes the whole payload as one value of `kind`.

    `kind` is a msgspec Struct, a dataclass, a TypedDict, a mapping type (any object) or a class with
    pydantic's `model_validate_json` and `model_json_schema`. Members that it does not declare are
    refused at the top level; below it, what the class itself says holds.
    """
    if hasattr(kind, "model_validate_json") and hasattr(kind, "model_json_schema"):
        schema = dict(kind.model_json_schema())
        validate: Callable[[bytes | memoryview], object] = _pydantic(kind)
    else:
        schema = _schema(name, kind)
        validate = _decoder(kind)
    declared = schema.get("properties")
    if isinstance(declared, Mapping):
        schema.setdefault("additionalProperties", False)
    if schema.get("type") != "object":
        raise BadShape(f"{name}: the payload must be an object, which {kind!r} is not")
    check = isinstance(declared, Mapping) and schema["additionalProperties"] is False
    known = frozenset(declared) if isinstance(declared, Mapping) and check else None

    def arguments(raw: bytes | memoryview) -> tuple[tuple[object, ...], dict[str, object]]:
        if known is not None:
            _refuse_unknown(raw, known)
        return (validate(raw),), {}

    return Shape(schema, arguments, _secrets(schema))


def of_schema(schema: Mapping[str, object], check: Callable[[object], str | None]) -> Shape:
    """Return the shape of a payload that the author described as JSON Schema; the handler gets a dict.

    `check` answers what is wrong with a value, None for nothing. It is handed in because a JSON Schema
    validator is no business of the model.
    """

    def arguments(raw: bytes | memoryview) -> tuple[tuple[object, ...], dict[str, object]]:
        value = _json(raw)
        problem = check(value)
        if problem is not None:
            raise BadPayload(problem)
        return (value,), {}

    closed = dict(schema)
    closed.setdefault("type", "object")
    return Shape(closed, arguments, _secrets(closed))


def schema_of_options(kind: object) -> dict[str, object]:
    """Return the JSON Schema of a plugin's options, declared as a schema, a Struct or a dataclass.

    Options that are not declared are refused, unless a schema says otherwise itself.
    """
    schema = dict(kind) if isinstance(kind, Mapping) else _schema("options", kind)
    schema.setdefault("type", "object")
    schema.setdefault("additionalProperties", False)
    return schema


def context_parameter(run: Callable[..., object], context: type) -> str | None:
    """Return the name of the parameter that takes the job's context: `ctx`, or the one of that type."""
    for parameter in inspect.signature(run).parameters.values():
        if parameter.name == "ctx" or parameter.annotation in (context, context.__name__):
            return parameter.name
    return None


def _hints(name: str, run: Callable[..., object], parameters: list[inspect.Parameter]) -> dict[str, object]:
    # Only what the payload needs: the context's type may be imported for type checkers alone.
    named = {p.name: p.annotation for p in parameters if p.annotation is not inspect.Parameter.empty}
    function: typing.Any = run
    while isinstance(function, functools.partial):
        function = function.func
    if not hasattr(function, "__globals__") and not hasattr(function, "__wrapped__"):
        function = function.__call__
    scope = getattr(inspect.unwrap(function), "__globals__", {})
    try:
        return typing.get_type_hints(SimpleNamespace(__annotations__=named), scope, include_extras=True)
    except (NameError, TypeError, SyntaxError) as error:
        # Under `from __future__ import annotations` a class made inside a function can't be found.
        raise BadShape(f"{name}: a type can't be resolved ({error}); define it at module level") from error


def _struct(name: str, fields: list[tuple[str, object, object]]) -> type[msgspec.Struct]:
    members: list[typing.Any] = []
    for field, hint, default in fields:
        if default is inspect.Parameter.empty:
            members.append((field, hint))
        elif isinstance(default, (list, dict, set)) and default:
            # A handler's default would be shared between jobs: each decode makes its own. Of an empty
            # one msgspec makes copies by itself, and can show it in the schema.
            members.append((field, hint, msgspec.field(default_factory=default.copy)))
        else:
            members.append((field, hint, msgspec.field(default=default)))
    try:
        return msgspec.defstruct(_identifier(name), members, forbid_unknown_fields=True, kw_only=True)
    except TypeError as error:
        raise BadShape(f"{name}: {error}") from error


def _schema(name: str, kind: object) -> dict[str, object]:
    try:
        (top,), parts = msgspec.json.schema_components([kind], ref_template="#/$defs/{name}")
    except TypeError as error:
        raise BadShape(f"{name}: {error}") from error
    found: dict[str, object] = dict(top)
    reference = found.get("$ref")
    if isinstance(reference, str):
        key = reference.removeprefix("#/$defs/")
        found = {k: v for k, v in parts[key].items() if k != "title"}
        if not _refers(parts, reference):
            parts = {k: v for k, v in parts.items() if k != key}
    if parts:
        found["$defs"] = dict(parts)
    return found


def _refers(value: object, reference: str) -> bool:
    if isinstance(value, Mapping):
        return value.get("$ref") == reference or any(_refers(v, reference) for v in value.values())
    return isinstance(value, (list, tuple)) and any(_refers(v, reference) for v in value)


def _secrets(schema: Mapping[str, object]) -> tuple[str, ...]:
    properties = schema.get("properties")
    if not isinstance(properties, Mapping):
        return ()
    return tuple(k for k, v in properties.items() if isinstance(v, Mapping) and v.get("writeOnly") is True)


def _decoder(kind: object) -> Callable[[bytes | memoryview], object]:
    try:
        decoder = msgspec.json.Decoder(kind)
    except TypeError as error:
        raise BadShape(str(error)) from error

    def decode(raw: bytes | memoryview) -> object:
        try:
            return decoder.decode(raw)
        except msgspec.ValidationError as error:
            # JSON Schema calls 2.0 an integer, msgspec does not: what the door let in must be readable.
            try:
                return msgspec.convert(_whole(_json(raw)), kind)
            except (msgspec.ValidationError, RecursionError):
                raise BadPayload(_told(error)) from error
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            raise BadPayload(_told(error)) from error

    return decode


def _pydantic(kind: typing.Any) -> Callable[[bytes | memoryview], object]:
    def decode(raw: bytes | memoryview) -> object:
        try:
            return kind.model_validate_json(bytes(raw))
        except ValueError as error:
            raise BadPayload(_pydantic_problem(error)) from error

    return decode


def _pydantic_problem(error: ValueError) -> str:
    errors = getattr(error, "errors", None)
    if not callable(errors):
        return "does not fit the payload's model"
    # str(error) repeats the input, which may be a secret.
    return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in errors()[:5])


def _refuse_unknown(raw: bytes | memoryview, known: frozenset[str]) -> None:
    value = _json(raw)
    unknown = [member for member in value if member not in known] if isinstance(value, dict) else []
    if unknown:
        raise BadPayload(f"unknown member {unknown[0][:64]!r}")


def _json(raw: bytes | memoryview) -> object:
    try:
        return msgspec.json.decode(raw)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise BadPayload(_told(error)) from error


def _whole(value: object) -> object:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {k: _whole(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_whole(v) for v in value]
    return value


def _told(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "is nested too deep"
    return str(error)


def _is_class(hint: object) -> bool:
    if typing.get_origin(hint) is typing.Annotated:
        hint = typing.get_args(hint)[0]
    if not isinstance(hint, type):
        return False
    struct = issubclass(hint, msgspec.Struct) or dataclasses.is_dataclass(hint)
    return struct or hasattr(hint, "model_validate_json")


def _identifier(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name) or "payload"
