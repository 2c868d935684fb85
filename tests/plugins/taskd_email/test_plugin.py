"""The plugin as taskd sees it: its hooks, its job type, and one job from payload to mail."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pluggy
import pytest

import taskd_email
from taskd.model.job import new_id
from taskd.plugin import Fail, Hooks, RetryLater
from taskd_email import send_email, taskd_check, taskd_child_started, taskd_child_stopping, taskd_job_types
from taskd_email.resend import NotSent
from tests.plugins.resend_standin import Answer, ResendStandIn
from tests.plugins.taskd_email.conftest import MakeContext

NOW = datetime(2026, 7, 1, 12, 0, tzinfo=UTC)
KEY = "re_0123456789"
DOCUMENTED = {"to": "recipient@example.com", "from": "sender@example.com", "subject": "Test Email"}


def id_of_age(age: timedelta) -> str:
    return str(new_id(int((NOW - age).timestamp() * 1000), b"\x00" * 10))


FRESH = id_of_age(timedelta(0))


def test_its_hooks_are_those_of_taskd() -> None:
    manager = pluggy.PluginManager("taskd")
    manager.add_hookspecs(Hooks)

    manager.register(taskd_email)

    manager.check_pending()
    hooks = {caller.name for caller in manager.get_hookcallers(taskd_email) or []}
    assert hooks == {
        "taskd_check",
        "taskd_child_started",
        "taskd_child_stopping",
        "taskd_job_types",
        "taskd_options_schema",
    }


def test_send_email_shares_a_process_and_is_limited_to_two_a_second() -> None:
    [declared] = taskd_job_types({"api_key": KEY})

    info = declared.info(plugin="email", schema={}, secrets=())

    assert (info.name, info.isolation, info.rate) == ("send_email", "async", 2.0)


def test_the_job_outlives_its_call() -> None:
    [declared] = taskd_job_types({"api_key": KEY, "timeout": "60s"})

    assert declared.info(plugin="email", schema={}, secrets=()).timeout == 70


def test_the_message_itself_is_masked() -> None:
    [declared] = taskd_job_types({"api_key": KEY})

    members = declared.payload["properties"]
    assert {name for name, member in members.items() if member.get("writeOnly")} == {
        "attachments",
        "html",
        "text",
    }


def test_a_bad_option_stops_the_start() -> None:
    with pytest.raises(ValueError, match="base_url"):
        taskd_job_types({"api_key": KEY, "base_url": "http://example.com"})


async def test_a_child_opens_and_closes_one_client(stand_in: ResendStandIn) -> None:
    resend = taskd_child_started({"api_key": stand_in.api_key, "base_url": stand_in.url})
    await resend.send({**DOCUMENTED, "text": "x"}, key="k", now=NOW)

    await taskd_child_stopping()

    with pytest.raises(RuntimeError, match="closed"):
        await resend.send({**DOCUMENTED, "text": "x"}, key="k", now=NOW)


async def test_the_check_sends_nothing(stand_in: ResendStandIn) -> None:
    problems = await taskd_check({"api_key": stand_in.api_key, "base_url": stand_in.url})

    assert (problems, stand_in.sent) == ([], [])


async def test_the_documented_payload_becomes_a_mail(
    make_context: MakeContext, stand_in: ResendStandIn
) -> None:
    result = await send_email(DOCUMENTED, ctx=make_context(job_id=FRESH, now=NOW))

    [sent] = stand_in.sent
    assert result == {"id": sent.id}
    assert sent.key == f"taskd/{FRESH}"
    assert sent.body == {**DOCUMENTED, "text": "Test Email"}


async def test_all_attempts_of_a_job_send_one_mail(
    make_context: MakeContext, stand_in: ResendStandIn
) -> None:
    stand_in.script(Answer(drop=True, accept=True))

    with pytest.raises(NotSent):
        await send_email(DOCUMENTED, ctx=make_context(job_id=FRESH, now=NOW))
    later = NOW + timedelta(hours=1)
    result = await send_email(DOCUMENTED, ctx=make_context(job_id=FRESH, now=later, attempt=2))

    assert [mail.id for mail in stand_in.sent] == [result["id"]]


async def test_two_jobs_with_the_same_payload_are_two_mails(
    make_context: MakeContext, stand_in: ResendStandIn
) -> None:
    await send_email(DOCUMENTED, ctx=make_context(job_id=FRESH, now=NOW))
    await send_email(DOCUMENTED, ctx=make_context(job_id=id_of_age(timedelta(seconds=1)), now=NOW))

    assert len(stand_in.sent) == 2


async def test_the_first_attempt_of_a_job_scheduled_long_ago_is_sent(
    make_context: MakeContext, stand_in: ResendStandIn
) -> None:
    await send_email(DOCUMENTED, ctx=make_context(job_id=id_of_age(timedelta(days=300)), now=NOW))

    assert len(stand_in.sent) == 1


async def test_after_a_day_nothing_is_sent_again(make_context: MakeContext, stand_in: ResendStandIn) -> None:
    context = make_context(job_id=id_of_age(timedelta(hours=25)), now=NOW, attempt=2)

    with pytest.raises(Fail, match="may have sent this mail"):
        await send_email(DOCUMENTED, ctx=context)

    assert stand_in.requests == []


async def test_too_many_recipients_fail_without_a_call(
    make_context: MakeContext, stand_in: ResendStandIn
) -> None:
    payload = {**DOCUMENTED, "bcc": [f"r{n}@example.com" for n in range(50)]}

    with pytest.raises(Fail, match="51 recipients"):
        await send_email(payload, ctx=make_context(job_id=FRESH, now=NOW))

    assert stand_in.requests == []


async def test_a_second_type_can_have_its_own_sender(
    make_context: MakeContext, stand_in: ResendStandIn
) -> None:
    payload = {"to": "a@example.com", "subject": "hi"}
    context = make_context(job_id=FRESH, now=NOW, default_from="News <news@example.com>")

    await send_email(payload, ctx=context)

    assert stand_in.sent[0].body["from"] == "News <news@example.com>"


async def test_a_date_to_come_back_is_counted_from_the_contexts_clock(
    make_context: MakeContext, stand_in: ResendStandIn
) -> None:
    stand_in.script(Answer.error(429, "rate_limit_exceeded", retry_after="Wed, 01 Jul 2026 12:00:05 GMT"))

    with pytest.raises(RetryLater) as caught:
        await send_email(DOCUMENTED, ctx=make_context(job_id=FRESH, now=NOW))

    assert caught.value.delay_s == 5
