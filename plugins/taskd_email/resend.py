"""Resend's HTTP API: one call that sends a mail, and what each of its answers means for the job.

The provider is not trusted: at most `MAX_ANSWER` bytes of an answer are read, in bounded time, redirects
are not followed, proxies and certificates named by the environment are not used. Of an answer only the
name of an error and a short, cleaned message get into an error text; the key and the mail never do.

Source: resend.com/docs, API reference (send-email, errors, rate-limit) and "Idempotency Keys", read in
2026: keys are remembered for 24 hours, the same key with another body is 409.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from uuid import UUID

import httpx

from taskd.plugin import Fail, RetryLater
from taskd_email.options import Options

MAX_ANSWER = 64 * 1024
"""Bytes of an answer that are read; the real ones have less than a thousand."""

KEY_LIFE = timedelta(hours=24)
"""How long Resend remembers an idempotency key; after that, the same call is a second mail."""

LONGEST_WAIT = timedelta(hours=1)
"""The most that a `Retry-After` is obeyed for, unless a quota is used up."""

QUOTA_WAIT = timedelta(hours=6)
"""The pause when the quota of the day or month is used up and the answer asks for no longer one."""

LONGEST_QUOTA_WAIT = timedelta(hours=12)
"""The most that a `Retry-After` is obeyed for when a quota is used up."""

_QUOTAS = frozenset({"daily_quota_exceeded", "monthly_quota_exceeded"})

_CLOCKS = timedelta(minutes=15)  # by how much the clocks of two hosts may differ, and a call may last
_SHORTEST_SECRET = 4  # characters; blotting out each "a" would hide nothing and spoil the message
_LONGEST_MESSAGE = 300

# The 4xx, 409 apart, that the same request can get over: a slow upload, an early replay, the rate.
_CURABLE = frozenset(
    {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS},
)


class NotSent(Exception):
    """No usable answer: the mail may have gone out or not. The retry policy decides what comes next.

    Sending again is safe while Resend remembers the idempotency key.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came back, cut to `MAX_ANSWER` bytes; header names in lower case."""

    status: int
    retry_after: str | None = None
    body: bytes = b""
    whole: bool = True
    """Whether `body` is all of it."""


class Resend:
    """The connections to Resend; a child process has one, from its start to its end."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._client = httpx.AsyncClient(
            headers={
                "Authorization": f"Bearer {options.api_key}",
                "Accept": "application/json",
                # A compressed answer could be a thousand times its size, past the limit on bytes read.
                "Accept-Encoding": "identity",
                "User-Agent": "taskd-email",  # Resend refuses requests without one
            },
            timeout=options.timeout.total_seconds(),
            follow_redirects=False,
            trust_env=False,
        )

    async def send(self, mail: Mapping[str, object], *, key: str, now: datetime) -> str:
        """Send `mail`, the body of `POST /emails`, and return the id that Resend gave it.

        `key` is the idempotency key: a second call with the same key and mail sends nothing and returns
        the first id. `now` is what a `Retry-After` with a date is counted from.

        Raises:
            Fail: sending it again can't help.
            RetryLater: Resend named a time, or a quota is used up.
            NotSent: anything else.
        """
        headers = {"Content-Type": "application/json", "Idempotency-Key": key}
        answer = await self._call("POST", "/emails", headers=headers, body=json.dumps(mail).encode())
        private = (self._options.api_key, mail.get("text"), mail.get("html"))
        return read_answer(answer, now=now, private=[text for text in private if isinstance(text, str)])

    async def check(self) -> list[str]:
        """Return what would keep mails from going out, one sentence each; sends none.

        A key that may only send mails is refused here by name, and that shows that it is known.
        """
        try:
            answer = await self._call("GET", "/domains", headers={}, body=b"")
        except NotSent as error:
            return [f"{error}."]
        if answer.status == HTTPStatus.OK or _name(_object(answer)) == "restricted_api_key":
            return []
        if answer.status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
            return [f"Resend refuses the api_key ({answer.status}). Make a new one in its dashboard."]
        return [f"{_reason(answer, [self._options.api_key])}."]

    async def close(self) -> None:
        """Close the connections; nothing can be sent after that."""
        await self._client.aclose()

    async def _call(self, method: str, path: str, *, headers: Mapping[str, str], body: bytes) -> Answer:
        url = f"{self._options.base_url}{path}"
        limit_s = self._options.timeout.total_seconds()
        try:
            # httpx's own timeout is for each read: an answer that drips would go on for ever.
            async with asyncio.timeout(limit_s):
                async with self._client.stream(method, url, content=body, headers=headers) as response:
                    return await _read(response)
        except (TimeoutError, httpx.TimeoutException):
            raise NotSent(f"no answer from Resend within {limit_s:g} s") from None
        except httpx.HTTPError as error:
            raise NotSent(f"Resend can't be reached: {type(error).__name__}: {error}") from None


async def _read(response: httpx.Response) -> Answer:
    body = b""
    async for chunk in response.aiter_raw():
        body += chunk
        if len(body) > MAX_ANSWER:
            break
    return Answer(
        status=response.status_code,
        retry_after=response.headers.get("Retry-After"),
        body=body[:MAX_ANSWER],
        whole=len(body) <= MAX_ANSWER,
    )


def read_answer(answer: Answer, *, now: datetime, private: Sequence[str]) -> str:
    """Return the mail's id that `answer` holds, or raise what it means for the job.

    The texts of `private` are blotted out, should the provider quote them.

    Raises:
        Fail, RetryLater, NotSent: see `Resend.send`.
    """
    content = _object(answer)
    if 200 <= answer.status < 300:
        found = content.get("id")
        if isinstance(found, str) and re.fullmatch(r"[!-~]{1,100}", found):
            return found
        raise NotSent(f"Resend answered {answer.status} without the id of a mail")
    name = _name(content)
    reason = _reason(answer, private)
    wait = retry_after(answer.retry_after, now=now)
    if answer.status == HTTPStatus.TOO_MANY_REQUESTS and name in _QUOTAS:
        raise RetryLater(min(max(wait or QUOTA_WAIT, QUOTA_WAIT), LONGEST_QUOTA_WAIT), reason)
    curable = answer.status >= 500 or answer.status in _CURABLE
    # 409: another call with this key is under way, unless it says that the mail differs.
    if not curable and not (answer.status == HTTPStatus.CONFLICT and name != "invalid_idempotent_request"):
        raise Fail(reason)
    if wait is not None:
        raise RetryLater(min(wait, LONGEST_WAIT), reason)
    raise NotSent(reason)


def retry_after(header: str | None, *, now: datetime) -> timedelta | None:
    """Return the pause that a `Retry-After` header asks for, at least a second; None if it says nothing.

    Both forms of RFC 9110, section 10.2.3: seconds, or a date.

    >>> retry_after("7", now=datetime(2026, 1, 1, tzinfo=UTC))
    datetime.timedelta(seconds=7)
    """
    if header is None:
        return None
    if re.fullmatch(r"[0-9]{1,9}", header.strip()):
        wait = timedelta(seconds=int(header))
    else:
        try:
            until = parsedate_to_datetime(header)
        except ValueError:
            return None
        if until.tzinfo is None:
            until = until.replace(tzinfo=UTC)
        wait = until - now
    return max(wait, timedelta(seconds=1))


def _object(answer: Answer) -> Mapping[str, object]:
    """Return the JSON object in the body, an empty one if there is none."""
    if not answer.whole:
        return {}
    try:
        value = json.loads(answer.body)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _name(content: Mapping[str, object]) -> str:
    """Return the name of the error that an answer's body gives, empty if it is none."""
    name = content.get("name")
    return name if isinstance(name, str) and re.fullmatch(r"[a-z0-9_]{1,64}", name) else ""


def _reason(answer: Answer, private: Sequence[str]) -> str:
    """Return an error text for people: the status, and of the answer no more than is safe to show."""
    text = f"Resend answered {answer.status}"
    if 300 <= answer.status < 400:
        return f"{text}, a redirect. Redirects are not followed: correct base_url"
    content = _object(answer)
    name, message = _name(content), content.get("message")
    if not name:
        return text
    if not isinstance(message, str):
        return f"{text} {name}"
    for secret in private:
        if len(secret) >= _SHORTEST_SECRET:
            message = message.replace(secret, "[...]")
    shown = "".join(letter if letter.isprintable() else " " for letter in message)
    return f"{text} {name}: {shown[:_LONGEST_MESSAGE]}"


def key_is_forgotten(job_id: str, *, attempt: int, now: datetime) -> bool:
    """Return whether an earlier attempt may have sent this mail under a key that Resend has forgotten.

    A handler is not told when its first attempt was, so the time when the job was submitted stands in
    for it: the first 48 bits of its id, a version 7 UUID (RFC 9562, section 5.7). That errs on the safe
    side. The first attempt itself may be as late as it likes.
    """
    if attempt <= 1:
        return False
    id = UUID(job_id)
    if id.version != 7:
        return False
    submitted = datetime.fromtimestamp((id.int >> 80) / 1000, UTC)
    return now - submitted >= KEY_LIFE - _CLOCKS
