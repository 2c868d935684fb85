"""Signals of a daemon as events: the first TERM or INT drains, the second skips the wait."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable, Mapping
from types import TracebackType

_ENDING = (signal.SIGTERM, signal.SIGINT)


class Signals:
    """What this process has been told by signal. Used as `with Signals(log) as signals:` in its loop.

    `hooks` are called in the loop: HUP reloads, USR1 opens logs again, USR2 writes down the state.
    HUP, USR1 and USR2 without a hook are logged and do nothing: their default would end the daemon.
    """

    def __init__(
        self, log: logging.Logger, hooks: Mapping[signal.Signals, Callable[[], None]] | None = None
    ) -> None:
        self.draining = asyncio.Event()
        """Set by the first TERM or INT: stop claiming, let run, put back."""
        self.quick = asyncio.Event()
        """Set by the second: don't wait for what runs."""
        self._log = log
        self._hooks: dict[signal.Signals, Callable[[], None] | None] = {
            signal.SIGHUP: None,
            signal.SIGUSR1: None,
            signal.SIGUSR2: None,
            **(hooks or {}),
        }

    def __enter__(self) -> Signals:
        self._loop = asyncio.get_running_loop()
        for number in _ENDING:
            self._loop.add_signal_handler(number, self._end, number)
        for number in self._hooks:
            self._loop.add_signal_handler(number, self._call, number)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number in (*_ENDING, *self._hooks):
            self._loop.remove_signal_handler(number)

    def drain(self) -> None:
        """Do what a signal would: the first call sets `draining`, the second `quick`."""
        if self.draining.is_set():
            self.quick.set()
        self.draining.set()

    def _end(self, number: signal.Signals) -> None:
        self.drain()
        event = "stopping at once" if self.quick.is_set() else "draining"
        self._log.info(event, extra={"signal": number.name})

    def _call(self, number: signal.Signals) -> None:
        hook = self._hooks[number]
        if hook is None:
            self._log.info("signal has no meaning here", extra={"signal": number.name})
        else:
            hook()
