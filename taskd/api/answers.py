"""Answers: rows and errors as JSON, documented members first and in the documented order."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec

from taskd.errors import BadRow, Refused, SchemaMismatch, StoreUnavailable
from taskd.model.job import Job, Run
from taskd.model.state import State
from taskd.service.health import Ready
from taskd.service.jobs import Bulk, Submitted
from taskd.store.audit import Entry
from taskd.store.keys import StoredKey

log = logging.getLogger("taskd.api")

JSON = "application/json; charset=utf-8"

STATUS: Mapping[str, int] = {
    "invalid_json": 400,
    "unsupported_value": 400,
    "number_out_of_range": 400,
    "duplicate_key": 400,
    "too_deep": 400,
    "too_many_keys": 400,
    "invalid_body": 400,
    "missing_field": 400,
    "invalid_field": 400,
    "unknown_field": 400,
    "exclusive_fields": 400,
    "unknown_type": 400,
    "invalid_payload": 400,
    "blocked_url": 400,
    "bad_request": 400,
    "unauthorized": 401,
    "forbidden": 403,
    "not_found": 404,
    "method_not_allowed": 405,
    "request_timeout": 408,
    "conflict": 409,
    "too_large": 413,
    "unsupported_media_type": 415,
    "rate_limited": 429,
    "backlog_full": 429,
    "internal_error": 500,
    "database_unavailable": 503,
    "shutting_down": 503,
    "not_ready": 503,
    "overloaded": 503,
}
"""The status of each error code."""

_encode = msgspec.json.Encoder().encode


class Answer(msgspec.Struct):
    """One answer. `headers` are those beyond the ones that every answer has; `close` ends the connection."""

    status: int
    body: bytes = b""
    headers: Iterable[tuple[str, str]] = ()
    close: bool = False
    kind: str = JSON
    """Its media type; an answer without a body has none."""


def ok(
    members: Mapping[str, Any] | msgspec.Struct,
    *,
    status: int = 200,
    headers: Iterable[tuple[str, str]] = (),
) -> Answer:
    """Return an answer with these members, in their order."""
    return Answer(status, _encode(members), headers)


def error(problem: Exception, request_id: str) -> Answer:
    """Return the answer for what went wrong; what is not expected is logged and told as `internal_error`."""
    refused = refusal(problem, request_id)
    members: dict[str, Any] = {
        "message": str(refused),
        "error": refused.error,
        "fields": [{"path": one.path, "problem": one.problem} for one in refused.fields],
        "request_id": request_id,
        **refused.extra,
    }
    status = STATUS[refused.error]
    return Answer(status, _encode(members), refused.headers.items())


def refusal(problem: Exception, request_id: str) -> Refused:
    """Return what clients are told of `problem`: never the words of the driver, nor of a traceback."""
    if isinstance(problem, Refused):
        return problem
    if isinstance(problem, StoreUnavailable):
        log.warning("the database is unavailable", extra={"error": str(problem), "request_id": request_id})
        message = "the database is unavailable; whether the request was carried out is unknown"
        if isinstance(problem, SchemaMismatch):
            message = "the database has no schema for this version of taskd"
        return Refused("database_unavailable", message, headers={"Retry-After": "2"})
    if isinstance(problem, BadRow):
        return Refused("unsupported_value", "the database can't store a value of this request")
    log.error("request failed", exc_info=problem, extra={"request_id": request_id})
    return Refused("internal_error", "taskd has a defect; the log has more under this request_id")


def raw(text: str | None) -> msgspec.Raw | None:
    """Return stored JSON text as a member's value, as it stands."""
    return None if text is None else msgspec.Raw(text.encode())


def moment(at: datetime | None) -> str | None:
    """Return a moment in RFC 3339, UTC with `Z`."""
    if at is None:
        return None
    return at.astimezone(UTC).replace(tzinfo=None).isoformat() + "Z"


class SubmittedJob(msgspec.Struct, gc=False):
    """The members of the answer to a submit; those that are UNSET come with `?wait=` alone.

    A struct, as this is the answer of which there are thousands a second.
    """

    message: str
    id: str
    job_id: str
    status: State
    scheduled_at: datetime
    duplicate: bool
    warnings: tuple[str, ...]
    attempts: int | msgspec.UnsetType = msgspec.UNSET
    error_message: str | msgspec.UnsetType | None = msgspec.UNSET
    result: msgspec.Raw | msgspec.UnsetType | None = msgspec.UNSET
    started_at: str | msgspec.UnsetType | None = msgspec.UNSET
    finished_at: str | msgspec.UnsetType | None = msgspec.UNSET

    def add(self, outcome: Job) -> None:
        """Tell what became of the job so far."""
        self.status = outcome.status
        self.attempts = outcome.attempts
        self.error_message = outcome.error_message
        self.result = raw(outcome.result)
        self.started_at = moment(outcome.started_at)
        self.finished_at = moment(outcome.finished_at)


def submitted(receipt: Submitted) -> SubmittedJob:
    """Return the answer to a submit."""
    job_id = str(receipt.id)
    run_at = receipt.run_at
    return SubmittedJob(
        message="Message successfully received",
        id=f"Message of id: {job_id}",
        job_id=job_id,
        status=receipt.status,
        scheduled_at=run_at if run_at.tzinfo is UTC else run_at.astimezone(UTC),
        duplicate=receipt.duplicate,
        warnings=receipt.warnings,
    )


def submitted_bulk(bulk: Bulk) -> dict[str, Any]:
    """Return the members of the answer to a bulk."""
    return {
        "message": "Messages successfully received",
        "accepted": len(bulk.ids),
        "jobs": [
            {"job_id": job_id, "duplicate": duplicate}
            for job_id, duplicate in zip(bulk.ids, bulk.duplicates, strict=True)
        ],
        "warnings": list(bulk.warnings),
    }


def job(one: Job, *, waiting_for: str | None = None, secrets: Sequence[str] = ()) -> dict[str, Any]:
    """Return the members of a job; top-level payload members named in `secrets` are masked."""
    return {
        "id": str(one.id),
        "type": one.type,
        "payload": masked(one.payload, secrets),
        "status": one.status.value,
        "attempts": one.attempts,
        "max_attempts": one.max_attempts,
        "created_at": moment(one.created_at),
        "scheduled_at": moment(one.run_at),
        "error_message": one.error_message,
        "result": raw(one.result),
        "progress": one.progress,
        "priority": one.priority,
        "started_at": moment(one.started_at),
        "finished_at": moment(one.finished_at),
        "unique_key": one.unique_key,
        "tags": list(one.tags),
        "meta": {} if one.meta is None else raw(one.meta),
        "history": [_run(entry) for entry in one.history],
        "waiting_for": waiting_for,
    }


_raw_members: Callable[[bytes], dict[str, msgspec.Raw]] = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_MASK = msgspec.Raw(b'"***"')


def masked(payload: str, secrets: Sequence[str]) -> msgspec.Raw:
    """Return the JSON text of a payload with the values of its `secrets` replaced by `***`."""
    text = payload.encode()
    if not secrets:
        return msgspec.Raw(text)
    members = _raw_members(text)
    members.update({name: _MASK for name in secrets if name in members})
    return msgspec.Raw(_encode(members))


def _run(entry: Run) -> dict[str, Any]:
    return {
        "attempt": entry.attempt,
        "claim": entry.claim,
        "node": entry.node,
        "started_at": moment(entry.started_at),
        "ended_at": moment(entry.ended_at),
        "cause": entry.cause.value,
        "error": entry.error,
        "exit_code": entry.exit_code,
        "signal": entry.signal,
        "cpu_s": entry.cpu_s,
        "max_rss": entry.max_rss,
    }


def key(one: StoredKey) -> dict[str, Any]:
    """Return the members of a key: its fingerprint, never its digest."""
    rate = None if one.rate is None else float(one.rate)
    return {
        "id": str(one.id),
        "name": one.name,
        "key_hash": one.fingerprint,
        "created_at": moment(one.created_at),
        "last_used_at": moment(one.last_used_at),
        "expires_at": moment(one.expires_at),
        **_more(one),
        "rate_limit": {"rate": rate, "burst": one.burst},
    }


def new_key(one: StoredKey, text: str) -> dict[str, Any]:
    """Return the members of the only answer that ever shows a key's text."""
    rate = None if one.rate is None else float(one.rate)
    return {
        "id": str(one.id),
        "name": one.name,
        "key": text,
        "created_at": moment(one.created_at),
        "warning": "Save this key securely. It wont be shown again",
        "expires_at": moment(one.expires_at),
        **_more(one),
        "rate_limit": {"rate": rate, "burst": one.burst},
    }


def rotated_key(one: StoredKey, text: str, old: StoredKey) -> dict[str, Any]:
    """Return the members of the only answer that ever shows the key that came in place of `old`."""
    replaced = {"id": str(old.id), "expires_at": moment(old.expires_at)}
    return {**new_key(one, text), "replaces": replaced}


def audit(entry: Entry) -> dict[str, Any]:
    """Return the members of an entry of the audit log."""
    return {
        "id": str(entry.id),
        "at": moment(entry.at),
        "actor": entry.actor,
        "action": entry.action,
        "target": entry.target,
        "address": entry.address,
        "request_id": entry.request_id,
        "detail": raw(entry.detail),
    }


def _more(one: StoredKey) -> dict[str, Any]:
    return {
        "revoked_at": moment(one.revoked_at),
        "description": one.description,
        "prefix": one.prefix,
        "public_id": one.public_id,
        "client": str(one.client),
        "rotated_from": None if one.rotated_from is None else str(one.rotated_from),
        "scopes": list(one.scopes),
        "types": one.types,
        "max_pending": one.max_pending,
    }


def ready(state: Ready, request_id: str) -> Answer:
    """Return the answer of `/ready`; one that says no has the members of an error too."""
    members: dict[str, Any] = {
        "message": "ready" if state.ready else "not ready",
        "checks": {"database": state.database, "schema": state.schema, "workers": state.workers},
    }
    if state.ready:
        return ok(members)
    members |= {"error": "not_ready", "fields": [], "request_id": request_id}
    return ok(members, status=503, headers=[("Retry-After", "2")])
