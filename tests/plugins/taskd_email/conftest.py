"""A Resend on loopback and a context for the handler, for the tests of the e-mail plugin."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from datetime import datetime, timedelta

import pytest

from taskd.plugin import Context
from taskd_email.options import Options
from taskd_email.resend import Resend
from tests.plugins.resend_standin import ResendStandIn


class Sink:
    """Keeps what a handler says about its run."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, ctx: Context, level: str, text: str) -> None:
        self.lines.append(text)

    def progress(self, ctx: Context, percent: float, message: str) -> None:
        self.lines.append(message)


@pytest.fixture
def stand_in() -> Iterator[ResendStandIn]:
    with ResendStandIn() as running:
        yield running


@pytest.fixture
async def resend(stand_in: ResendStandIn) -> AsyncIterator[Resend]:
    """The client under test, pointed at the stand-in."""
    client = Resend(
        Options(api_key=stand_in.api_key, base_url=stand_in.url, timeout=timedelta(seconds=30)),
    )
    yield client
    await client.close()


MakeContext = Callable[..., Context]


@pytest.fixture
def make_context(stand_in: ResendStandIn, resend: Resend) -> MakeContext:
    """Return a function that makes the context of one attempt, as a child does."""

    def make(*, job_id: str, now: datetime, attempt: int = 1, **options: object) -> Context:
        return Context(
            job_id=job_id,
            type="send_email",
            attempt=attempt,
            max_attempts=3,
            timeout_s=20.0,
            grace=5.0,
            options={"api_key": stand_in.api_key, "base_url": stand_in.url, **options},
            resources=resend,
            sink=Sink(),
            clock=lambda: 0.0,
            started=now.timestamp(),
        )

    return make
