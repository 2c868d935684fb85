"""Which plugins there are, what job types they have, and what is wrong with them, at the file's lines.

A plugin is loaded in a child process only. Those that ship come first, then those that the file names,
in its order, then the installed ones that it neither names nor disables.
"""

from __future__ import annotations

import asyncio
import difflib
import importlib.metadata
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from taskd.cli.settings import CHILD, changes, plain
from taskd.config.jobtypes import COMMAND_KEYS
from taskd.config.plugins import plugin_problems
from taskd.config.read import Config
from taskd.config.tree import Tree
from taskd.errors import ConfigError, Problem
from taskd.model.jobtype import Retry, TypeInfo
from taskd.process.environment import child_env
from taskd.registry import Answer, Registry, describe, merge
from taskd.wire import Plugin, PluginProblem

ENTRY_POINTS = "taskd"
SHIPPED = ("taskd.builtin.echo",)
COMMANDS = "taskd.builtin.command"


@dataclass(frozen=True, slots=True)
class Source:
    """A plugin and where it comes from. `entry` is its number in `plugins:`, None when it is not there.

    `commands` are the job types of `job_types:` that are programs, for the plugin that runs them.
    """

    plugin: Plugin
    entry: int | None = None
    commands: tuple[str, ...] = ()
    found: bool = False
    """Installed, and not in the file."""


@dataclass(frozen=True, slots=True)
class Installed:
    """An entry point of the group `taskd`."""

    name: str
    module: str


def installed() -> list[Installed]:
    """Return the plugins that are installed with an entry point, by name."""
    points = importlib.metadata.entry_points(group=ENTRY_POINTS)
    return sorted({point.name: Installed(point.name, point.module) for point in points}.values(), key=_name)


def _name(point: Installed) -> str:
    return point.name


def sources(tree: Tree, points: Iterable[Installed]) -> list[Source]:
    """Return the plugins of this configuration; `points` are the installed ones."""
    found = [Source(Plugin(module=module)) for module in SHIPPED]
    found += _commands(tree)
    for index, entry in enumerate(tree.plugins):
        if entry.enabled:
            plugin = Plugin(module=entry.module, name=entry.name, options=plain(entry.config))
            found.append(Source(plugin, index))
    in_file = {name for entry in tree.plugins for name in (entry.name, entry.module) if name is not None}
    # An entry `module: taskd_email` speaks of the entry point `email = taskd_email`, too.
    found += [
        Source(Plugin(name=point.name), found=True)
        for point in points
        if point.name not in in_file and point.module not in in_file
    ]
    return found


def _commands(tree: Tree) -> Iterator[Source]:
    """Yield one plugin a pool for the types that are programs: a child gets only its pool's options."""
    pools: dict[str, dict[str, object]] = {}
    for name, entry in tree.job_types.items():
        if entry.command is None:
            continue
        options = {key: getattr(entry, key) for key in ("command", *COMMAND_KEYS, "description")}
        given = {key: plain(value) for key, value in options.items() if value is not None}
        if entry.cwd is not None:
            given["cwd"] = str(entry.cwd)
        pools.setdefault(entry.pool or "default", {})[name] = given
    for types in pools.values():
        yield Source(Plugin(module=COMMANDS, options={"types": types}), commands=tuple(types))


def load(config: Config, environ: Mapping[str, str], *, node: str = "") -> tuple[Registry, list[str]]:
    """Describe all plugins and lay the file's `job_types:` over what they declare.

    Opens no connection. Returns the types that this node runs, and what an operator should know.

    Raises:
        ConfigError: a plugin can't be loaded, or a key speaks of a job type or pool that there is not.
    """
    wanted = sources(config.tree, installed())
    answers = asyncio.run(
        describe([source.plugin for source in wanted], argv=CHILD, env=child_env(environ, node))
    )
    problems, warnings = judge(config, wanted, answers)
    if problems:
        raise ConfigError(config.file, problems)
    answers = [_with_defaults(answer, config.tree) for answer in answers]
    problems = [
        *_twice(config, wanted, answers),
        *_unknown_types(config, answers),
    ]
    if problems:
        raise ConfigError(config.file, problems)
    registry = merge(answers, changes(config.tree))
    problems = _unknown_pools(config, registry)
    if problems:
        raise ConfigError(config.file, problems)
    return _only(registry, config.tree.workers.types), warnings


def judge(
    config: Config, wanted: Sequence[Source], answers: Sequence[Answer]
) -> tuple[list[Problem], list[str]]:
    """Return the problems of the file that `answers` are, and warnings of plugins that are left out."""
    problems: list[Problem] = []
    warnings: list[str] = []
    for source, answer in zip(wanted, answers, strict=True):
        found = answer.problems
        if source.entry is not None:
            problems += plugin_problems(config, [(source.entry, one.path, one.message) for one in found])
        elif source.commands:
            problems += [_command_problem(config, source, one) for one in found]
        elif source.found and found and all(one.missing for one in found):
            reason = "; ".join(one.message for one in found)
            warnings.append(
                f"plugin {source.plugin.name} is installed, and its job types are absent: {reason}"
            )
        else:
            problems += [_found_problem(source, one) for one in found]
    return problems, warnings


def _found_problem(source: Source, found: PluginProblem) -> Problem:
    name = source.plugin.name or source.plugin.module
    fix = (
        f"; to do without it list it in plugins: `name: {name}` with `enabled: false`" if source.found else ""
    )
    where = f"{found.path}: " if found.path.startswith("config.") else ""
    return Problem(
        0, "plugins", f"plugin {name}, which is installed, can't be used: {where}{found.message}{fix}"
    )


def _command_problem(config: Config, source: Source, found: PluginProblem) -> Problem:
    """Put what the plugin of commands says about `types.NAME.KEY` at `job_types.NAME.KEY`."""
    place, message = found.path.removeprefix("config.").removeprefix("config"), found.message
    told = re.match(r"types\.(\S+): ", message)
    if not place and told is not None:
        place, message = f"types.{told[1]}", message[told.end() :]
    path = place.replace("types.", "job_types.", 1) if place.startswith("types.") else "job_types"
    if not any(path.startswith(f"job_types.{name}") for name in source.commands):
        path = "job_types"
    return Problem(config.where(path), path, message)


def _with_defaults(answer: Answer, tree: Tree) -> Answer:
    """Return `answer` with the defaults of this file where an author has left taskd's own."""
    return Answer(answer.plugin, [_default(info, tree) for info in answer.types], answer.problems)


_OWN = TypeInfo(name="", handler="", plugin="")


def _default(info: TypeInfo, tree: Tree) -> TypeInfo:
    section = {
        "max_attempts": tree.retry.max_attempts,
        "backoff": tree.retry.backoff,
        "backoff_base": tree.retry.backoff_base.total_seconds(),
        "backoff_cap": tree.retry.backoff_cap.total_seconds(),
    }
    own = Retry()
    said: dict[str, Any] = {
        name: value for name, value in section.items() if getattr(info.retry, name) == getattr(own, name)
    }
    timeout = tree.workers.job_timeout.total_seconds() if info.timeout == _OWN.timeout else info.timeout
    return msgspec.structs.replace(info, timeout=timeout, retry=msgspec.structs.replace(info.retry, **said))


def _twice(config: Config, wanted: Sequence[Source], answers: Sequence[Answer]) -> list[Problem]:
    """Return a problem for each job type that a second plugin declares."""
    owners: dict[str, str] = {}
    problems = []
    for source, answer in zip(wanted, answers, strict=True):
        for info in answer.types:
            first = owners.get(info.name)
            if first is None:
                owners[info.name] = info.plugin
                continue
            path = "plugins"
            if source.entry is not None:
                path = f"plugins[{source.entry}]"
            elif source.commands:
                path = f"job_types.{info.name}.command"
            message = f"job type {info.name} is declared by the plugin {first} already (duplicate)"
            problems.append(Problem(config.where(path), path, f"{message}; {info.plugin} can't have it too"))
    return problems


def _unknown_types(config: Config, answers: Sequence[Answer]) -> list[Problem]:
    declared = {info.name for answer in answers for info in answer.types}
    problems = []
    for name, entry in config.tree.job_types.items():
        handler = entry.handler or name
        if handler not in declared:
            path = f"job_types.{name}.handler" if entry.handler else f"job_types.{name}"
            message = f"no plugin has a job type {handler}{_near(handler, declared)}"
            problems.append(Problem(config.where(path), path, message))
    known = declared | set(config.tree.job_types)
    for index, name in enumerate(config.tree.workers.types):
        if name not in known:
            path = f"workers.types[{index}]"
            message = f"there is no job type {name}{_near(name, known)}"
            problems.append(Problem(config.where(path), path, message))
    return problems


def _unknown_pools(config: Config, registry: Registry) -> list[Problem]:
    """Return a problem for each type whose author wants a pool that the file does not have."""
    pools = config.tree.all_pools
    problems = []
    for name, info in sorted(registry.infos.items()):
        if info.pool not in pools:
            path = f"job_types.{name}"
            message = (
                f"job type {name} of the plugin {info.plugin} runs in the pool {info.pool}, which this file "
                f"does not have: add pools.{info.pool}, or set {path}.pool"
            )
            problems.append(Problem(config.where(path), path, message))
    return problems


def _only(registry: Registry, types: Sequence[str]) -> Registry:
    if not types:
        return registry
    return Registry(
        infos={name: info for name, info in registry.infos.items() if name in types},
        plugins={name: plugin for name, plugin in registry.plugins.items() if name in types},
    )


def _near(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else f"; known are {', '.join(sorted(known))}"
