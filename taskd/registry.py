"""The job types of a node: what its plugins declare, with the file's `job_types:` laid over it.

Plugin code runs in children only: each plugin is described by a child process of its own, which sees
this plugin's options and nobody else's. What comes back is data.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import msgspec

from taskd.errors import PluginError
from taskd.model.jobtype import TypeInfo
from taskd.wire import Describe, Described, Plugin, PluginProblem

DESCRIBE_TIMEOUT_S = 30.0
"""A plugin that takes longer to import than this is refused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Registry:
    """The types by name, and which plugin a child has to load for each."""

    infos: Mapping[str, TypeInfo]
    plugins: Mapping[str, Plugin]


@dataclass(frozen=True, slots=True)
class Answer:
    """What one plugin's describing child said."""

    plugin: Plugin
    types: Sequence[TypeInfo]
    problems: Sequence[PluginProblem]


async def describe(plugins: Sequence[Plugin], *, argv: Sequence[str], env: Mapping[str, str]) -> list[Answer]:
    """Describe each plugin in a child process of its own, all at once, in the order given.

    `argv` starts `python -m taskd.child`, without further arguments; `env` is the children's environment.
    """
    return list(await asyncio.gather(*(_describe_one(plugin, argv, env) for plugin in plugins)))


async def _describe_one(plugin: Plugin, argv: Sequence[str], env: Mapping[str, str]) -> Answer:
    name = plugin.module or plugin.name or ""
    process = await asyncio.create_subprocess_exec(
        *argv,
        "--describe",
        env=dict(env),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    question = msgspec.json.encode(Describe(plugins=[plugin]))
    try:
        answer, _ = await asyncio.wait_for(process.communicate(question), DESCRIBE_TIMEOUT_S)
        said = msgspec.json.decode(answer, type=Described)
    except (TimeoutError, msgspec.MsgspecError):
        if process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what the plugin has started, too
            await process.wait()
            what = f"took longer than {DESCRIBE_TIMEOUT_S:g} s to say what job types it has"
        else:
            what = f"ended its process while it was loaded (exit code {process.returncode})"
        path = "module" if plugin.module else "name"
        return Answer(plugin, (), (PluginProblem(plugin=0, path=path, message=f"plugin {name} {what}"),))
    return Answer(plugin, said.types, said.problems)


def merge(described: Sequence[Answer], changes: Mapping[str, Mapping[str, object]]) -> Registry:
    """Return the registry: each declared type, and each lane of `changes`, changed as it says.

    `changes` are the members of `TypeInfo` that the file sets, by type; `handler` names the type whose
    code a new lane runs. Members of `retry` are laid over the author's one by one.

    Raises:
        PluginError: two plugins declare the same type, or a change names a handler that nobody declares.
    """
    declared: dict[str, TypeInfo] = {}
    plugins: dict[str, Plugin] = {}
    for one in described:
        for info in one.types:
            if info.name in declared:
                raise PluginError(
                    f"job type {info.name} is declared by {declared[info.name].plugin} and by {info.plugin}: "
                    "disable one of the two plugins"
                )
            declared[info.name] = info
            plugins[info.name] = one.plugin
    infos = dict(declared)
    for name, change in changes.items():
        handler = str(change.get("handler", name))
        if handler not in declared:
            raise PluginError(
                f"job_types.{name}: no plugin has a job type {handler}; "
                f"known are {', '.join(sorted(declared))}"
            )
        members = {key: value for key, value in change.items() if key not in ("handler", "retry")}
        retry = change.get("retry")
        if isinstance(retry, Mapping):
            members["retry"] = msgspec.structs.replace(declared[handler].retry, **retry)
        infos[name] = msgspec.structs.replace(declared[handler], name=name, **members)
        plugins[name] = plugins[handler]
    return Registry(infos=infos, plugins=plugins)
