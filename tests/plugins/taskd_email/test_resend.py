"""What the plugin sends over HTTP, and what each answer means for the job; against a real server."""

from __future__ import annotations

import json
import logging
import shutil
import ssl
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from taskd.model.job import new_id
from taskd.plugin import Fail, RetryLater
from taskd_email.options import Options
from taskd_email.resend import (
    LONGEST_QUOTA_WAIT,
    LONGEST_WAIT,
    MAX_ANSWER,
    QUOTA_WAIT,
    Answer,
    NotSent,
    Resend,
    key_is_forgotten,
    read_answer,
    retry_after,
)
from tests.plugins.resend_standin import Answer as Scripted
from tests.plugins.resend_standin import ResendStandIn

NOW = datetime(2026, 7, 1, 12, 0, tzinfo=UTC)
KEY = "taskd/0197c5a4-0000-7000-8000-000000000001"
BODY = "Your code is 814-220-973."
MAIL = {"to": ["r@example.com"], "from": "s@example.com", "subject": "Code", "text": BODY}


async def outcome(resend: Resend, *, key: str = KEY) -> Exception:
    """Return the exception that sending `MAIL` ends with."""
    with pytest.raises((Fail, RetryLater, NotSent)) as caught:
        await resend.send(MAIL, key=key, now=NOW)
    return caught.value


# What is sent


async def test_a_mail_arrives_with_the_key_and_id(resend: Resend, stand_in: ResendStandIn) -> None:
    found = await resend.send(MAIL, key=KEY, now=NOW)

    [sent] = stand_in.sent
    assert (sent.id, sent.key, sent.body) == (found, KEY, MAIL)


async def test_every_field_arrives_as_given(resend: Resend, stand_in: ResendStandIn) -> None:
    mail = {
        **MAIL,
        "cc": "c@example.com",
        "bcc": ["Dee <d@example.com>"],
        "reply_to": "a@example.com",
        "subject": "Grüße \U0001f600",
        "html": "<p>\u2028</p>",
        "headers": {"X-Ref": "1"},
        "tags": [{"name": "kind", "value": "code"}],
        "attachments": [{"filename": "a.txt", "content": "QUJD", "content_type": "text/plain"}],
    }

    await resend.send(mail, key=KEY, now=NOW)

    assert stand_in.sent[0].body == mail


async def test_the_same_key_sends_once(resend: Resend, stand_in: ResendStandIn) -> None:
    first = await resend.send(MAIL, key=KEY, now=NOW)

    assert await resend.send(MAIL, key=KEY, now=NOW) == first
    assert len(stand_in.sent) == 1


@pytest.mark.parametrize(
    "lost",
    [
        pytest.param(Scripted(drop=True, accept=True), id="connection closed"),
        pytest.param(Scripted(status=500, accept=True), id="500 after the mail was taken"),
        pytest.param(Scripted(body=b"<html>", accept=True), id="200 with garbage"),
        pytest.param(Scripted(body=b"x" * 10_000_000, accept=True), id="10 MB"),
    ],
)
async def test_a_lost_answer_does_not_send_twice(
    resend: Resend, stand_in: ResendStandIn, lost: Scripted
) -> None:
    stand_in.script(lost)

    assert isinstance(await outcome(resend), NotSent)
    again = await resend.send(MAIL, key=KEY, now=NOW)

    assert [mail.id for mail in stand_in.sent] == [again]


async def test_one_connection_serves_many_mails(resend: Resend, stand_in: ResendStandIn) -> None:
    for n in range(3):
        await resend.send(MAIL, key=f"{KEY}/{n}", now=NOW)

    assert len({request.peer for request in stand_in.requests}) == 1


async def test_proxies_of_the_environment_are_not_used(
    stand_in: ResendStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ResendStandIn() as proxy:
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "all_proxy"):
            monkeypatch.setenv(name, proxy.url)
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        resend = Resend(Options(api_key=stand_in.api_key, base_url=stand_in.url))

        await resend.send(MAIL, key=KEY, now=NOW)
        await resend.close()

        assert (len(stand_in.sent), proxy.requests) == (1, [])


# What the answers mean


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(Scripted.error(400, "validation_error"), id="bad request"),
        pytest.param(Scripted.error(401, "missing_api_key"), id="no key"),
        pytest.param(Scripted.error(403, "invalid_api_key"), id="wrong key"),
        pytest.param(Scripted.error(404, "not_found"), id="wrong base_url"),
        pytest.param(Scripted.error(405, "method_not_allowed"), id="wrong method"),
        pytest.param(Scripted.error(409, "invalid_idempotent_request"), id="key used for another mail"),
        pytest.param(Scripted.error(413, "payload_too_large"), id="too large"),
        pytest.param(Scripted.error(422, "invalid_from_address"), id="refused field"),
        pytest.param(Scripted.error(451, "security_error"), id="unknown 4xx"),
        pytest.param(Scripted.error(422, "validation_error", retry_after="5"), id="4xx that says when"),
        pytest.param(Scripted(status=307, headers={"Location": "/elsewhere"}), id="redirect"),
        pytest.param(Scripted(status=403, body=b"<html>blocked</html>"), id="refusal that is no JSON"),
    ],
)
async def test_what_cannot_be_cured_fails_at_once(
    resend: Resend, stand_in: ResendStandIn, answer: Scripted
) -> None:
    stand_in.script(answer)

    found = await outcome(resend)

    assert isinstance(found, Fail)
    assert str(answer.status) in found.reason
    assert len(stand_in.requests) == 1


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(Scripted.error(500, "application_error"), id="server error"),
        pytest.param(Scripted(status=502, body=b"<html>"), id="gateway error without JSON"),
        pytest.param(Scripted.error(503, "x", retry_after="soon"), id="time that can't be read"),
        pytest.param(Scripted.error(429, "rate_limit_exceeded"), id="rate without a time"),
        pytest.param(Scripted.error(409, "concurrent_idempotent_requests"), id="same key under way"),
        pytest.param(Scripted(status=409), id="conflict without a name"),
        pytest.param(Scripted(status=408), id="upload too slow for them"),
        pytest.param(Scripted(drop=True), id="connection closed without an answer"),
        pytest.param(Scripted(body=b""), id="200 and nothing"),
        pytest.param(Scripted(body=b"<html>"), id="200 with garbage"),
        pytest.param(Scripted(body=b'{"id": 7}'), id="200 with a number as id"),
        pytest.param(Scripted(body=b'{"id": "a\\nb"}'), id="200 with a line end in the id"),
        pytest.param(Scripted(body=b"[" * 60_000), id="200 nested too deep to parse"),
        pytest.param(Scripted(body=b'{"id":"x"}' + b" " * MAX_ANSWER), id="200 beyond the limit"),
        pytest.param(Scripted(body=b"{}", headers={"Content-Encoding": "gzip"}), id="200 as false gzip"),
    ],
)
async def test_what_may_pass_is_left_to_the_retry_policy(
    resend: Resend, stand_in: ResendStandIn, answer: Scripted
) -> None:
    stand_in.script(answer)

    assert isinstance(await outcome(resend), NotSent)


@pytest.mark.parametrize(
    ("answer", "wait"),
    [
        pytest.param(Scripted.error(429, "rate_limit_exceeded", retry_after="7"), 7, id="rate"),
        pytest.param(Scripted.error(503, "x", retry_after="30"), 30, id="server that says when"),
        pytest.param(Scripted.error(429, "x", retry_after="0"), 1, id="never at once"),
        pytest.param(
            Scripted.error(429, "rate_limit_exceeded", retry_after="Wed, 01 Jul 2026 12:01:30 GMT"),
            90,
            id="date",
        ),
        pytest.param(
            Scripted.error(429, "x", retry_after="999999999"),
            LONGEST_WAIT.total_seconds(),
            id="absurd time is capped",
        ),
        pytest.param(
            Scripted.error(429, "daily_quota_exceeded"), QUOTA_WAIT.total_seconds(), id="day's quota"
        ),
        pytest.param(
            Scripted.error(429, "monthly_quota_exceeded", retry_after="1"),
            QUOTA_WAIT.total_seconds(),
            id="month's quota, hours whatever the header says",
        ),
        pytest.param(
            Scripted.error(429, "daily_quota_exceeded", retry_after="80000"),
            LONGEST_QUOTA_WAIT.total_seconds(),
            id="quota, capped",
        ),
    ],
)
async def test_a_time_to_come_back_is_obeyed(
    resend: Resend, stand_in: ResendStandIn, answer: Scripted, wait: float
) -> None:
    stand_in.script(answer)

    found = await outcome(resend)

    assert isinstance(found, RetryLater)
    assert found.delay_s == wait


async def test_a_server_that_hangs_is_given_up(stand_in: ResendStandIn) -> None:
    resend = Resend(
        Options(api_key=stand_in.api_key, base_url=stand_in.url, timeout=timedelta(milliseconds=50)),
    )
    stand_in.script(Scripted(hang=True))

    found = await outcome(resend)
    await resend.close()

    assert isinstance(found, NotSent)
    assert str(found) == "no answer from Resend within 0.05 s"


async def test_a_server_that_drips_is_given_up(stand_in: ResendStandIn) -> None:
    resend = Resend(
        Options(api_key=stand_in.api_key, base_url=stand_in.url, timeout=timedelta(milliseconds=200)),
    )
    stand_in.script(Scripted(body=b'{"id": "x"}' + b" " * 60_000, drip_s=0.02))

    found = await outcome(resend)
    await resend.close()

    assert isinstance(found, NotSent)


async def test_nobody_listening_is_left_to_the_retry_policy() -> None:
    with ResendStandIn() as gone:
        url = gone.url
    resend = Resend(Options(api_key="re_x", base_url=url))

    found = await outcome(resend)
    await resend.close()

    assert isinstance(found, NotSent)
    assert "can't be reached" in str(found)


async def test_a_redirect_is_not_followed(resend: Resend, stand_in: ResendStandIn) -> None:
    with ResendStandIn() as elsewhere:
        stand_in.script(Scripted(status=308, headers={"Location": f"{elsewhere.url}/emails"}))

        found = await outcome(resend)

        assert isinstance(found, Fail)
        assert elsewhere.requests == []


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its certificate with openssl")
async def test_a_certificate_that_nobody_vouches_for_is_refused(tmp_path: Path) -> None:
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    files = ["-keyout", str(tmp_path / "key"), "-out", str(tmp_path / "cert")]
    subprocess.run([*command, *subject, *files], check=True, capture_output=True)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(tmp_path / "cert", tmp_path / "key")

    with ResendStandIn(tls=tls) as stand_in:
        resend = Resend(Options(api_key=stand_in.api_key, base_url=stand_in.url))
        found = await outcome(resend)
        await resend.close()

    assert isinstance(found, NotSent)
    assert "CERTIFICATE_VERIFY_FAILED" in str(found)
    assert stand_in.requests == []


# What people see


async def test_a_refusal_says_what_resend_said(resend: Resend, stand_in: ResendStandIn) -> None:
    stand_in.script(Scripted.error(403, "validation_error", "The example.com domain is not verified."))

    found = await outcome(resend)

    assert str(found) == "Resend answered 403 validation_error: The example.com domain is not verified."


async def test_no_answer_brings_the_key_or_the_mail_into_an_error(
    resend: Resend, stand_in: ResendStandIn
) -> None:
    stand_in.script(Scripted.error(422, "validation_error", f"Bearer {stand_in.api_key} sent {BODY}"))

    found = await outcome(resend)

    assert str(found) == "Resend answered 422 validation_error: Bearer [...] sent [...]"


async def test_an_answer_forges_no_log_line(resend: Resend, stand_in: ResendStandIn) -> None:
    stand_in.script(Scripted.error(422, "validation_error", "a\r\nERROR b\x1b[31m\u2028c" + "d" * 9000))

    text = str(await outcome(resend))

    assert text.isprintable()
    assert len(text) < 400


async def test_logs_and_reprs_hold_no_secret(
    resend: Resend, stand_in: ResendStandIn, caplog: pytest.LogCaptureFixture
) -> None:
    for name in (None, "httpx", "httpcore"):  # a daemon that was set up in this process has quietened them
        caplog.set_level(logging.DEBUG, name)
    stand_in.script(Scripted.error(500, "application_error"))

    failure = await outcome(resend)
    await resend.send(MAIL, key=KEY, now=NOW)

    options = Options(api_key=stand_in.api_key, base_url=stand_in.url)
    seen = f"{caplog.text} {failure!r} {resend!r} {options!r} {vars(resend)!r}"
    assert caplog.text
    assert stand_in.api_key not in seen
    assert BODY not in seen


# Pieces


def test_an_answer_that_is_cut_counts_as_unreadable() -> None:
    answer = Answer(status=200, body=b'{"id": "x"}', whole=False)

    with pytest.raises(NotSent, match="without the id"):
        read_answer(answer, now=NOW, private=())


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        pytest.param(None, None, id="absent"),
        pytest.param("", None, id="empty"),
        pytest.param("-1", None, id="negative"),
        pytest.param("1.5", None, id="fraction is not in the RFC"),
        pytest.param("1" * 400, None, id="number without end"),
        pytest.param("\u0663", None, id="digit beyond ASCII"),
        pytest.param(" 7 ", 7, id="spaces around"),
        pytest.param("Wed, 01 Jul 2026 11:00:00 GMT", 1, id="date in the past"),
        pytest.param("Wed, 01 Jul 2026 12:00:10 -0000", 10, id="date without a zone is UTC"),
        pytest.param("Wed, 99 Jul 2026 12:00:10 GMT", None, id="no date"),
    ],
)
def test_retry_after_is_read_in_both_forms(header: str | None, seconds: int | None) -> None:
    wait = retry_after(header, now=NOW)

    assert (wait.total_seconds() if wait else None) == seconds


@pytest.mark.parametrize(
    ("age", "attempt", "forgotten"),
    [
        pytest.param(timedelta(days=30), 1, False, id="a first attempt may be late"),
        pytest.param(timedelta(hours=23), 2, False, id="within the day"),
        pytest.param(timedelta(hours=24), 2, True, id="after the day"),
        pytest.param(timedelta(hours=23, minutes=50), 2, True, id="margin for clocks that differ"),
    ],
)
def test_a_key_is_not_trusted_beyond_its_life(age: timedelta, attempt: int, forgotten: bool) -> None:
    submitted_ms = int((NOW - age).timestamp() * 1000)
    job_id = str(new_id(submitted_ms, b"\xff" * 10))

    assert key_is_forgotten(job_id, attempt=attempt, now=NOW) is forgotten


def test_an_id_without_a_time_stops_no_attempt() -> None:
    assert not key_is_forgotten("9b2f7c1e-5d44-4b0a-8f0e-1f6f3c0d7a11", attempt=2, now=NOW)


# The check of `taskd doctor`


async def test_a_key_that_may_only_send_passes_the_check(resend: Resend, stand_in: ResendStandIn) -> None:
    assert await resend.check() == []
    assert stand_in.sent == []


async def test_a_wrong_key_is_a_problem(stand_in: ResendStandIn) -> None:
    resend = Resend(Options(api_key="re_wrong_0123456789", base_url=stand_in.url))

    [problem] = await resend.check()
    await resend.close()

    assert problem == "Resend refuses the api_key (403). Make a new one in its dashboard."


async def test_no_way_to_resend_is_a_problem() -> None:
    with ResendStandIn() as gone:
        url = gone.url
    resend = Resend(Options(api_key="re_x", base_url=url))

    [problem] = await resend.check()
    await resend.close()

    assert "can't be reached" in problem


async def test_the_stand_in_refuses_what_resend_refuses(resend: Resend, stand_in: ResendStandIn) -> None:
    """The tests above are worth no more than the server they talk to."""
    bad: list[dict[str, object]] = [
        {**MAIL, "text": ""},
        {**MAIL, "to": "a@example.com, b@example.com"},
        {**MAIL, "to": [f"r{n}@example.com" for n in range(51)]},
        {**MAIL, "from": "nobody"},
        {**MAIL, "subject": "a\nb"},
        {**MAIL, "headers": {"X-A": "1\r\n2"}},
        {**MAIL, "tags": [{"name": "a b", "value": "c"}]},
        {**MAIL, "attachments": [{"filename": "a", "content": "no base64"}]},
        {**MAIL, "replyTo": "a@example.com"},
    ]

    for mail in bad:
        with pytest.raises(Fail):
            await resend.send(mail, key=KEY, now=NOW)
    assert (len(stand_in.requests), stand_in.sent) == (len(bad), [])


async def test_the_stand_in_forgets_keys_after_a_day() -> None:
    times = iter([0.0, 3600.0, 24 * 3600.0])
    with ResendStandIn(clock=lambda: next(times)) as stand_in:
        resend = Resend(Options(api_key=stand_in.api_key, base_url=stand_in.url))

        first, second, third = [await resend.send(MAIL, key=KEY, now=NOW) for _ in range(3)]
        await resend.close()

    assert first == second != third
    assert json.loads(stand_in.requests[0].body) == MAIL
