"""All plugins of one child, from its setup to its end: opened once, lanes made of them, closed once."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from taskd.child.load import Handler, NotLoaded, Trouble, load, raised
from taskd.child.run import Lane, Limits, wrapper
from taskd.wire import Setup, TypeSetup

_log = logging.getLogger("taskd.child")


class Stage:
    """The loaded plugins of this child and what their jobs share; owned by the child's main."""

    def __init__(self, setup: Setup) -> None:
        """Load the plugins that `setup` names.

        Raises:
            NotLoaded: one can't be loaded, or a type has no handler that can run here.
        """
        self._plugins = [load(plugin) for plugin in setup.plugins]
        self._found = [(wanted, *self._find(wanted, setup.isolation)) for wanted in setup.types]
        self._limits = Limits(result_bytes=setup.result_bytes, error_bytes=setup.error_bytes)

    async def open(self) -> Mapping[str, Lane]:
        """Run `taskd_child_started` of each plugin and return the lane of each job type.

        Raises:
            NotLoaded: a hook raised; no value of an option is in the text.
        """
        resources = {}
        for index, plugin in enumerate(self._plugins):
            try:
                resources[index] = await _finished(plugin.hooks.taskd_child_started(options=plugin.options))
            except BaseException as error:  # an edge: other people's code
                raise NotLoaded(raised("taskd_child_started", error, "", plugin.options)) from None
        around = [
            wrapper(found.function, found.argnames)
            for plugin in self._plugins
            for found in plugin.hooks.taskd_around_job.get_hookimpls()
        ]
        hooks = [plugin.hooks.taskd_job_finished for plugin in self._plugins]
        heard = [hook for hook in hooks if hook.get_hookimpls()]
        return {
            wanted.type: Lane(
                name=wanted.type,
                handler=handler,
                options=MappingProxyType({**self._plugins[index].options, **wanted.options}),
                resources=resources[index],
                grace=wanted.grace_s,
                limits=self._limits,
                around=around,
                finished=heard,
            )
            for wanted, index, handler in self._found
        }

    async def close(self) -> None:
        """Run `taskd_child_stopping` of each plugin, the last one opened first; failures are logged."""
        for plugin in reversed(self._plugins):
            try:
                await _finished(plugin.hooks.taskd_child_stopping())
            except Exception:
                _log.warning("taskd_child_stopping raised", exc_info=True)

    def _find(self, wanted: TypeSetup, isolation: str) -> tuple[int, Handler]:
        for index, plugin in enumerate(self._plugins):
            handler = plugin.handlers.get(wanted.handler)
            if handler is None:
                continue
            if isolation == "async" and not handler.type.is_async:
                text = f"its handler {wanted.handler} is a plain def, which needs isolation: process"
                raise NotLoaded(Trouble("", f"job type {wanted.type}: {text}"))
            return index, handler
        raise NotLoaded(Trouble("", f"job type {wanted.type}: no plugin here has handler {wanted.handler}"))


async def _finished(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value
