"""Jobs, for their clients."""

from __future__ import annotations

import re
from contextlib import suppress
from datetime import datetime
from typing import Any
from uuid import UUID

from taskd.api import answers
from taskd.api.answers import Answer
from taskd.api.body import read_object
from taskd.api.route import Call, Route
from taskd.errors import Refused, StoreUnavailable
from taskd.model import names, payload
from taskd.model.job import Job
from taskd.model.state import State
from taskd.model.submit import HEADER, read_bulk, read_submit
from taskd.store.jobs import LAST_ID, Filter

MOST_LISTED = 200
LISTED = 50

_SECONDS = re.compile(r"[0-9]{1,3}(?:\.[0-9]{1,6})?")
_COUNT = re.compile(r"[0-9]{1,4}")
_STATES = tuple(state.value for state in State)


async def submit(call: Call) -> Answer:
    """Store a job; answered after its commit. With `?wait=` its outcome comes along."""
    wait_s = _wait_s(call)
    body = read_object(call.body)
    keys = call.request.headers.getall("idempotency-key", [])
    if len(keys) > 1:
        raise Refused.field("invalid_field", "Idempotency-Key", "stands there twice")
    ask = read_submit(body, now=call.services.now(), header_key=keys[0] if keys else None)
    key = call.client_key
    text = payload.payload_text(call.body, ask.payload)
    call.body = b""  # else it is held until the commit, beside the text of its payload
    receipt = await call.services.jobs.submit(
        ask,
        text,
        client=key.client,
        only=key.types,
        until=call.until,
    )
    told = answers.submitted(receipt)
    if wait_s is not None:
        # The job is stored: whatever happens to the wait, the answer is a receipt.
        with suppress(StoreUnavailable, Refused):
            told.add(await _finished(call, receipt.id, wait_s))
    return answers.ok(told, headers=(("Location", f"/jobs/{told.job_id}"),))


async def submit_bulk(call: Call) -> Answer:
    """Store 1 to 1000 jobs, all or none of them. Costs a token of the key's rate limit for each."""
    if call.request.headers.getall("idempotency-key", []):
        raise Refused.field("invalid_field", HEADER, "is for one job; here each job has its own unique_key")
    text = payload.bulk_of_lines(call.body) if call.ndjson else call.body
    bodies = read_bulk(read_object(text, above=3))
    key = call.client_key
    services = call.services
    more = len(bodies) - 1  # the first one was paid for before the body was read
    if more >= key.limit.burst:
        problem = f"are {more + 1}, more than this key may send at once: its burst is {key.limit.burst}"
        raise Refused.field("invalid_field", "jobs", problem)
    if more:
        await services.throttle.take(key, call.request, call.until, more, had=1)
        if key.max_pending is not None:
            await services.backlog.admit_client(key.client, key.max_pending, call.until, jobs=more)
    now = services.now()
    asks = [read_submit(one, now=now, path=f"jobs[{place}].") for place, one in enumerate(bodies)]
    texts = payload.payload_texts(text, [ask.payload for ask in asks])
    bulk = await services.jobs.submit_bulk(asks, texts, client=key.client, only=key.types, until=call.until)
    return answers.ok(answers.submitted_bulk(bulk))


async def show(call: Call) -> Answer:
    """Show a job; with `?wait=` when it is finished, or when that time is over."""
    job_id = _id(call)
    wait_s = _wait_s(call)
    if wait_s is None:
        return answers.ok(answers.job(await _job(call, job_id)))
    job = await _job(call, job_id)
    if not job.status.final:
        job = await _finished(call, job_id, wait_s)
    return answers.ok(answers.job(job))


async def list_(call: Call) -> Answer:
    """List the client's own jobs, newest first, without their histories; there is never a total."""
    query = call.query()
    limit = LISTED
    if "limit" in query:
        limit = int(query["limit"]) if _COUNT.fullmatch(query["limit"]) else 0
        if not 1 <= limit <= MOST_LISTED:
            raise Refused.field("invalid_field", "limit", f"must be a whole number from 1 to {MOST_LISTED}")
    before = LAST_ID
    if "cursor" in query:
        cursor = names.uuid(query["cursor"])
        if cursor is None:
            raise Refused.field("invalid_field", "cursor", "is not a next_cursor of this list")
        before = cursor
    only = Filter(**{name: _FILTERS[name](name, value) for name, value in query.items() if name in _FILTERS})
    for name in query:
        if name not in _FILTERS and name not in ("limit", "cursor"):
            raise Refused.field("unknown_field", name[:64], "is no parameter of this list")
    key = call.client_key
    jobs = call.services.jobs
    page = await jobs.list_(client=key.client, only=only, before=before, limit=limit, until=call.until)
    shown = [
        answers.job(job, secrets=jobs.secrets(job.type))
        for job in page.jobs
        if key.types is None or job.type in key.types
    ]
    return answers.ok({"jobs": shown, "next_cursor": None if page.before is None else str(page.before)})


async def _job(call: Call, job_id: UUID) -> Job:
    key = call.client_key
    return await call.services.jobs.show(job_id, client=key.client, only=key.types, until=call.until)


async def _finished(call: Call, job_id: UUID, wait_s: float) -> Job:
    """Return the job when it is finished, or as it is when `wait_s` is over."""
    await call.hold(call.services.jobs.waiting.wait(job_id, wait_s))
    return await _job(call, job_id)


def _id(call: Call) -> UUID:
    found = names.job_id(call.part("id"))
    if found is None:
        raise Refused("not_found", "there is no such job")
    return found


def _wait_s(call: Call) -> float | None:
    text = call.query().get("wait")
    if text is None:
        return None
    most = call.services.max_wait_s
    if not _SECONDS.fullmatch(text) or float(text) > most:
        raise Refused.field("invalid_field", "wait", f"must be a number of seconds from 0 to {most:g}")
    return float(text)


def _type(name: str, value: str) -> str:
    if not names.is_type(value):
        raise Refused.field("invalid_field", name, f"must match ^{names.TYPE.pattern}$")
    return value


def _status(name: str, value: str) -> str:
    if value not in _STATES:
        raise Refused.field("invalid_field", name, f"must be one of {', '.join(_STATES)}")
    return value


def _tag(name: str, value: str) -> str:
    if not names.is_tag(value):
        raise Refused.field("invalid_field", name, f"must be 1 to {names.MAX_TAG} printable characters")
    return value


def _unique_key(name: str, value: str) -> str:
    if not names.is_unique_key(value):
        raise Refused.field(
            "invalid_field", name, f"must be 1 to {names.MAX_UNIQUE_KEY} printable characters"
        )
    return value


def _moment(name: str, value: str) -> datetime:
    try:
        return names.instant(value)
    except ValueError as error:
        raise Refused.field("invalid_field", name, str(error)) from None


_FILTERS: dict[str, Any] = {
    "type": _type,
    "status": _status,
    "tag": _tag,
    "unique_key": _unique_key,
    "since": _moment,
    "until": _moment,
}

ROUTES = (
    Route(method="POST", path="/jobs", run=submit, scope="jobs:write", body=True),
    Route(method="POST", path="/jobs/bulk", run=submit_bulk, scope="jobs:write", body=True, ndjson=True),
    Route(method="GET", path="/jobs", run=list_, scope="jobs:read"),
    Route(method="GET", path="/jobs/<id:str>", run=show, scope="jobs:read"),
)
