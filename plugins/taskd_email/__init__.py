"""The e-mail plugin of taskd: the job type `send_email`, over Resend's HTTP API.

Only the hooks and the handler are here. `message` knows what a mail is, `resend` how it is sent and what
an answer means, `options` what the configuration may say. The manual page is docs/plugins/email.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta

from taskd.plugin import Context, Fail, JobType, hookimpl
from taskd_email.message import EXAMPLE, Unsendable, mail, payload_schema
from taskd_email.options import OPTIONS_SCHEMA, Options
from taskd_email.resend import KEY_LIFE, Resend, key_is_forgotten

RATE = "2/s"
"""Mails over all nodes: the lower of the limits that Resend has given for a team (2, later 5 a second)."""

_open: list[Resend] = []  # what this process has opened: the hook that closes it is told nothing


@hookimpl
def taskd_options_schema() -> Mapping[str, object]:
    """Name the options, for the check of the configuration."""
    return OPTIONS_SCHEMA


@hookimpl
def taskd_job_types(options: Mapping[str, object]) -> list[JobType]:
    """Declare `send_email`.

    Raises:
        ValueError: an option has a value that can't be used.
    """
    read = Options.read(options)
    return [
        JobType(
            name="send_email",
            run=send_email,
            payload=payload_schema(from_optional=read.default_from is not None),
            description="Send one mail through Resend.",
            example=EXAMPLE,
            timeout=read.timeout + timedelta(seconds=10),  # the call ends first, and says why
            rate=RATE,
        )
    ]


@hookimpl
def taskd_child_started(options: Mapping[str, object]) -> Resend:
    """Make the one HTTP client of this process; it connects at the first mail."""
    resend = Resend(Options.read(options))
    _open.append(resend)
    return resend


@hookimpl
async def taskd_child_stopping() -> None:
    """Close the connections."""
    while _open:
        await _open.pop().close()


@hookimpl
async def taskd_check(options: Mapping[str, object]) -> list[str]:
    """Ask Resend whether it knows the API key; no mail is sent."""
    resend = Resend(Options.read(options))
    try:
        return await resend.check()
    finally:
        await resend.close()


async def send_email(payload: Mapping[str, object], *, ctx: Context) -> dict[str, object]:
    """Send one mail; the result is `{"id": ...}`, Resend's name for it.

    Raises:
        Fail, RetryLater: as `Resend.send` says; also `Fail` when sending again could send it twice.
        NotSent: nobody knows whether it went out. Another attempt asks for the same mail by the same
            key, which sends it once.
    """
    resend: Resend = ctx.resources
    # The context has the only clock here, and a test's context a test's clock.
    now = ctx.deadline - timedelta(seconds=ctx.remaining())
    if key_is_forgotten(ctx.job_id, attempt=ctx.attempt, now=now):
        hours = KEY_LIFE.total_seconds() / 3600
        raise Fail(
            f"not tried again: an earlier attempt may have sent this mail, and after {hours:g} hours "
            "Resend can't tell any more. See whether it arrived; if not, submit it as a new job"
        )
    try:
        # From `ctx.options`, so that a second job type with this handler can have its own sender.
        body = mail(payload, default_from=Options.read(ctx.options).default_from)
    except Unsendable as error:
        raise Fail(str(error)) from None
    return {"id": await resend.send(body, key=ctx.idempotency_key, now=now)}
