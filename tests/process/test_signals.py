from __future__ import annotations

import asyncio
import logging
import os
import signal

import pytest

from taskd.process.signals import Signals

from .conftest import DEADLINE_S

LOG = logging.getLogger("test")


def tell(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_the_first_drains_and_the_second_skips_the_wait(number: signal.Signals) -> None:
    with Signals(LOG) as signals:
        tell(number)
        await asyncio.wait_for(signals.draining.wait(), DEADLINE_S)
        after_one = signals.quick.is_set()
        tell(signal.SIGTERM)
        await asyncio.wait_for(signals.quick.wait(), DEADLINE_S)

    assert not after_one


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
async def test_a_hook_is_called(number: signal.Signals) -> None:
    called = asyncio.Event()
    with Signals(LOG, {number: called.set}) as signals:
        tell(number)
        await asyncio.wait_for(called.wait(), DEADLINE_S)

    assert not signals.draining.is_set()


async def test_a_signal_without_a_hook_does_not_end_the_daemon() -> None:
    with Signals(LOG) as signals:
        tell(signal.SIGHUP)
        tell(signal.SIGTERM)
        await asyncio.wait_for(signals.draining.wait(), DEADLINE_S)
