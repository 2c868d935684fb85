"""Finds plugins, checks them and their options, and says what job types they have.

Each plugin has a plugin manager of its own: a hook call reaches this plugin alone, and so each gets
its own options and nobody else's. Whatever a plugin raises here becomes a problem that names the
exception's type; its text is shown without the values of options, which may be secrets.

What few plugins need is imported where it is needed: there are many children, and each has its own copy.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pluggy

from taskd.model import shape
from taskd.model.jobtype import TypeInfo
from taskd.model.names import RESERVED
from taskd.model.payload import clean_text
from taskd.obs.redact import MASK, REDACTOR
from taskd.plugin import Context, Hooks, JobType
from taskd.wire import Described, Plugin, PluginProblem

ENTRY_POINTS = "taskd"
"""The entry-point group in which installed plugins are found."""

MAX_PROBLEM = 2048
"""Bytes of a problem's message."""

_BUILTIN = "taskd.builtin."


@dataclass(frozen=True, slots=True)
class Handler:
    """A job type that can be run: the declaration, its payload's shape, how it takes the context."""

    type: JobType
    info: TypeInfo
    shape: shape.Shape
    context: str | None


@dataclass(frozen=True, slots=True)
class Loaded:
    """A plugin whose options fit: its hooks and its job types by name."""

    hooks: Any
    """pluggy's relay, with a method for each hook of `Hooks`."""
    options: Mapping[str, object]
    handlers: Mapping[str, Handler]


@dataclass(frozen=True, slots=True)
class Trouble:
    """One thing that is wrong with a plugin; the fields are those of `wire.PluginProblem`."""

    path: str
    message: str
    missing: bool = False


class NotLoaded(Exception):
    """A plugin can't be used; holds all that is wrong with it."""

    def __init__(self, *troubles: Trouble) -> None:
        self.troubles = troubles
        super().__init__("; ".join(f"{t.path}: {t.message}" if t.path else t.message for t in troubles))


def load(plugin: Plugin) -> Loaded:
    """Import `plugin`, check its options and ask it for its job types.

    Raises:
        NotLoaded: it can't be imported, is no plugin, refuses its options, or declares a type that
            can't be.
    """
    manager = pluggy.PluginManager("taskd")
    manager.add_hookspecs(Hooks)
    where = "name" if plugin.module is None else "module"
    _register(manager, _import(plugin, where), where)
    hooks = manager.hook
    _hide_secrets(plugin.options, _check_options(hooks, plugin.options, where))
    declared = _call(hooks.taskd_job_types, "config", plugin.options, options=plugin.options)
    handlers = {}
    for job_type in _job_types(declared, where):
        if job_type.name in handlers:
            raise NotLoaded(Trouble(where, f"declares job type {job_type.name} twice"))
        handlers[job_type.name] = _handler(job_type, _label(plugin), where, plugin.options)
    return Loaded(hooks, plugin.options, handlers)


def describe(plugins: Sequence[Plugin]) -> Described:
    """Return all job types of the plugins that can be loaded, and what is wrong with the others."""
    types: list[TypeInfo] = []
    problems: list[PluginProblem] = []
    for index, plugin in enumerate(plugins):
        try:
            loaded = load(plugin)
            types += _unclaimed(loaded, types, "name" if plugin.module is None else "module")
        except NotLoaded as refused:
            problems += _problems(index, refused)
    return Described(types=types, problems=problems)


def check(plugins: Sequence[Plugin]) -> Described:
    """Return what `describe` returns, with what the plugins' `taskd_check` have found as problems."""
    described = describe(plugins)
    broken = {problem.plugin for problem in described.problems}
    found = list(described.problems)
    for index, plugin in enumerate(plugins):
        if index not in broken:
            try:
                sentences = _check_one(load(plugin))
            except NotLoaded as refused:
                found += _problems(index, refused)
            else:
                found += [PluginProblem(plugin=index, path="", message=text) for text in sentences]
    return Described(types=described.types, problems=found)


def handler_of(job_type: JobType) -> Handler:
    """Return how `job_type` is run, outside of any plugin.

    Raises:
        NotLoaded: its payload has no shape, or its example does not fit.
    """
    return _handler(job_type, "", "", {})


def finished(value: Any) -> Any:
    """Return `value`, or what it returns when a hook was an `async def`; for where no loop runs."""
    return asyncio.run(_awaited(value)) if inspect.isawaitable(value) else value


def raised(what: str, error: BaseException, path: str, options: Mapping[str, object]) -> Trouble:
    """Return the problem that `what` has raised `error`; no value of `options` stands in it."""
    text = _without_values(_text(error), options)
    kind = type(error).__qualname__
    return Trouble(path, f"{what} raised {kind}: {text}" if text else f"{what} raised {kind}")


async def _awaited(value: Any) -> Any:
    return await value


def _import(plugin: Plugin, where: str) -> object:
    try:
        if plugin.module is not None:
            return importlib.import_module(plugin.module)
        from importlib.metadata import entry_points

        for entry in entry_points(group=ENTRY_POINTS, name=plugin.name or ""):
            return entry.load()
    except ModuleNotFoundError as error:
        if error.name is not None and (plugin.module or "").startswith(error.name):
            raise NotLoaded(Trouble(where, f"there is no module {error.name!r} to import")) from None
        raise NotLoaded(raised("its import", error, where, plugin.options)) from None
    except BaseException as error:  # an edge: a module may even call sys.exit
        raise NotLoaded(raised("its import", error, where, plugin.options)) from None
    names = sorted(entry.name for entry in entry_points(group=ENTRY_POINTS))
    raise NotLoaded(
        Trouble(where, f"no plugin of this name is installed{_did_you_mean(plugin.name or '', names)}")
    )


def _register(manager: pluggy.PluginManager, module: object, where: str) -> None:
    known = [name for name in vars(Hooks) if name.startswith("taskd_")]
    try:
        manager.register(module)
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        message = str(error).splitlines()[0]
        for name in _hook_names(manager, module):
            if name not in known:
                message = f"there is no hook {name}{_did_you_mean(name, known)}"
        raise NotLoaded(Trouble(where, message)) from None
    if not _hook_names(manager, module):
        raise NotLoaded(Trouble(where, "is not a taskd plugin: it implements no hook of taskd.plugin.Hooks"))


def _hook_names(manager: pluggy.PluginManager, module: object) -> list[str]:
    return [name for name in dir(module) if manager.parse_hookimpl_opts(module, name) is not None]


def _check_options(hooks: Any, options: Mapping[str, object], where: str) -> Mapping[str, object]:
    declared = _call(hooks.taskd_options_schema, where, options)
    if declared is None:
        return {}
    import jsonschema_rs

    try:
        schema = shape.schema_of_options(declared)
        validator = jsonschema_rs.validator_for(schema, mask="the value", retriever=_offline)
    except (TypeError, ValueError) as error:
        raise NotLoaded(raised("taskd_options_schema", error, where, options)) from None
    troubles = [
        trouble for error in validator.iter_errors(dict(options)) for trouble in _option(error, schema)
    ]
    if troubles:
        raise NotLoaded(*troubles)
    return schema


def _option(error: Any, schema: Mapping[str, Any]) -> Iterator[Trouble]:
    path = "config" + "".join(
        f"[{step}]" if isinstance(step, int) else f".{step}" for step in error.instance_path
    )
    if error.kind.name == "additionalProperties":
        names = list(_written(schema) if path == "config" else ())
        for name in error.kind.unexpected:
            yield Trouble(f"{path}.{name}", f"is no option of this plugin{_did_you_mean(name, names)}")
    elif error.kind.name == "required":
        name = error.kind.property
        forms = [form for form in _written(schema) if form in (name, f"{name}_file", f"{name}_env")]
        choice = f"; set {' or '.join(forms)}" if len(forms) > 1 else ""
        yield Trouble(path, f"{name} is missing{choice}", missing=True)
    else:
        yield Trouble(path, error.message)


def _written(schema: Mapping[str, Any]) -> Iterator[str]:
    """Yield the names by which options may be written: the reader takes `X_file` and `X_env` for a text X."""
    for name, option in schema.get("properties", {}).items():
        yield name
        if isinstance(option, Mapping) and _takes_text(option):
            yield f"{name}_file"
            yield f"{name}_env"


def _takes_text(option: Mapping[str, Any]) -> bool:
    kind = option.get("type")
    choices = [part for key in ("anyOf", "oneOf") for part in option.get(key, ())]
    return kind == "string" or (isinstance(kind, list) and "string" in kind) or any(map(_takes_text, choices))


def _hide_secrets(options: Mapping[str, object], schema: Mapping[str, Any]) -> None:
    """Have log lines and error texts of this process mask the secret options."""
    marked = schema.get("properties", {})
    for name, value in options.items():
        secret = isinstance(marked.get(name), Mapping) and marked[name].get("writeOnly") is True
        if isinstance(value, str) and (secret or REDACTOR.value("", name) == MASK):
            REDACTOR.hide(value)


def _job_types(declared: object, where: str) -> list[JobType]:
    if declared is None:
        return []
    if not isinstance(declared, Sequence) or isinstance(declared, str):
        raise NotLoaded(
            Trouble(where, f"taskd_job_types must return a list of job types, not {_kind(declared)}")
        )
    for job_type in declared:
        if not isinstance(job_type, JobType):
            hint = "; decorate it with @job" if callable(job_type) else ""
            raise NotLoaded(
                Trouble(where, f"taskd_job_types returned {_kind(job_type)} for a job type{hint}")
            )
    return list(declared)


def _handler(job_type: JobType, label: str, where: str, options: Mapping[str, object]) -> Handler:
    if job_type.name.startswith(RESERVED) and label != "builtin":
        raise NotLoaded(
            Trouble(where, f"job type {job_type.name}: names that begin with {RESERVED} are reserved")
        )
    try:
        found, context = _shape(job_type)
        info = job_type.info(plugin=label, schema=found.schema, secrets=found.secrets)
        problem = None if info.example is None else payload_check(found.schema)(info.example)
    except (TypeError, ValueError) as error:
        raise NotLoaded(raised(f"job type {job_type.name}", error, where, options)) from None
    if problem is not None:
        raise NotLoaded(
            Trouble(where, f"job type {job_type.name}: its example does not fit its payload: {problem}")
        )
    return Handler(job_type, info, found, context)


def _shape(job_type: JobType) -> tuple[shape.Shape, str | None]:
    context = shape.context_parameter(job_type.run, Context)
    if job_type.payload is None:
        return shape.of_signature(job_type.name, job_type.run, context), context
    if isinstance(job_type.payload, Mapping):
        return shape.of_schema(job_type.payload, payload_check(job_type.payload)), context
    return shape.of_class(job_type.name, job_type.payload), context


def payload_check(schema: Mapping[str, object]) -> Callable[[object], str | None]:
    """Return what says how a payload breaks `schema`, None when it does not; no values in the text."""
    import jsonschema_rs

    validator = jsonschema_rs.validator_for(dict(schema), mask="the value", retriever=_offline)

    def problem(value: object) -> str | None:
        for error in validator.iter_errors(value):
            path = ".".join(map(str, error.instance_path))
            return f"{path}: {error.message}" if path else str(error.message)
        return None

    return problem


def _offline(uri: str) -> Any:
    raise ValueError(f"a schema must be whole; {uri} is not fetched")


def _unclaimed(loaded: Loaded, types: Sequence[TypeInfo], where: str) -> list[TypeInfo]:
    owners = {known.name: known.plugin for known in types}
    taken = [name for name in loaded.handlers if name in owners]
    if taken:
        raise NotLoaded(
            Trouble(where, f"job type {taken[0]} is declared by plugin {owners[taken[0]]} already")
        )
    return [handler.info for handler in loaded.handlers.values()]


def _check_one(loaded: Loaded) -> list[str]:
    try:
        sentences = finished(loaded.hooks.taskd_check(options=loaded.options)) or []
        return [_without_values(str(sentence), loaded.options) for sentence in sentences]
    except BaseException as error:  # an edge: what a check raises is its finding
        return [raised("taskd_check", error, "", loaded.options).message]


def _call(hook: Any, path: str, private: Mapping[str, object], /, **arguments: object) -> Any:
    try:
        return hook(**arguments)
    except ValueError as error:
        # Raised on purpose to refuse the options: the author's own words.
        raise NotLoaded(Trouble(path, _without_values(str(error), private))) from None
    except BaseException as error:  # an edge: whatever a plugin raises is shown as its problem
        raise NotLoaded(raised(hook.name, error, path, private)) from None


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # an edge: an exception whose own text fails
        return ""


def _without_values(text: str, options: object) -> str:
    for value in sorted(_texts(options), key=len, reverse=True):
        text = text.replace(value, MASK)
    return clean_text(REDACTOR.text(text), MAX_PROBLEM)


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        # Shorter values are words of the sentence more often than secrets.
        if len(value) >= 4:
            yield value
    elif isinstance(value, Mapping):
        for member in value.values():
            yield from _texts(member)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _problems(index: int, refused: NotLoaded) -> list[PluginProblem]:
    return [
        PluginProblem(
            plugin=index, path=t.path, message=clean_text(t.message, MAX_PROBLEM), missing=t.missing
        )
        for t in refused.troubles
    ]


def _label(plugin: Plugin) -> str:
    if plugin.module is None:
        return plugin.name or ""
    return "builtin" if plugin.module.startswith(_BUILTIN) else plugin.module


def _kind(value: object) -> str:
    return f"a {type(value).__qualname__}"


def _did_you_mean(name: str, names: Sequence[str]) -> str:
    import difflib  # for people who mistype alone

    close = difflib.get_close_matches(name[:64], names, n=1)
    return f"; did you mean {close[0]}?" if close else ""
