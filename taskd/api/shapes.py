"""What routes take and answer, as JSON Schema (2020-12): the source of `/openapi.json`.

What a route needs (key, scope, token, body) stands in its `Route`, its text in its function; here is the
rest. Bounds come from the code that checks them. Answers are closed: a member that is not declared here
is found by the tests, which hold real answers against these schemas.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from taskd.api.answers import STATUS
from taskd.model import names, submit
from taskd.model.state import Cause, State
from taskd.service import keyask

Schema = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """Something that is given beside the path: in the query, or as a header."""

    name: str
    schema: Schema
    text: str
    place: str = "query"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One route: `answer` and `body` are names of `SCHEMAS`, None for none; `codes` are errors of its own."""

    group: str
    answer: str | None
    status: int = 200
    body: str | None = None
    parameters: tuple[Parameter, ...] = ()
    codes: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ("application/json",)
    """Media types of the answer."""
    body_kinds: tuple[str, ...] = ("application/json",)
    refusals: Mapping[int, str] = field(default_factory=dict)
    """Answers of another status that have a schema of their own."""
    location: bool = False
    """Whether the answer has the header `Location`."""


_UUID: Schema = {"type": "string", "format": "uuid"}
_TEXT: Schema = {"type": "string"}
_TIME: Schema = {"type": "string", "format": "date-time"}
_OBJECT: Schema = {"type": "object"}
_ANY: Schema = {}
_STATUS: Schema = {"type": "string", "enum": [state.value for state in State]}
_TYPE: Schema = {"type": "string", "pattern": f"^{names.TYPE.pattern}$", "examples": ["send_email"]}
_SCOPES: Schema = {"type": "array", "items": {"type": "string", "enum": list(keyask.SCOPES)}, "minItems": 1}
_SPAN: Schema = {"type": "number", "exclusiveMinimum": 0, "maximum": submit.YEAR_S}


def _or_null(schema: Schema) -> Schema:
    if "enum" in schema:
        return {"anyOf": [schema, {"type": "null"}]}
    return {**schema, "type": [schema["type"], "null"]}


def _told(schema: Schema, text: str) -> Schema:
    return {**schema, "description": text}


def _closed(members: Mapping[str, Schema], *, optional: tuple[str, ...] = (), **more: Any) -> Schema:
    """Return the schema of an object with these members and no others."""
    return {
        "type": "object",
        "properties": dict(members),
        "required": [name for name in members if name not in optional],
        "additionalProperties": False,
        **more,
    }


def _body(members: Mapping[str, Schema], required: tuple[str, ...] = (), **more: Any) -> Schema:
    """Return the schema of a body: members may be left out unless `required`."""
    optional = tuple(name for name in members if name not in required)
    return _closed(members, optional=optional, **more)


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


_SUBMIT: Mapping[str, Schema] = {
    "type": _told(_TYPE, "The job type. Names that begin with `taskd.` are taskd's."),
    "payload": _told(_OBJECT, "Must fit the schema of the type."),
    "priority": {"type": "integer", "minimum": -100, "maximum": 100, "description": "Higher runs first."},
    "delay": {"type": "number", "minimum": 0, "maximum": submit.YEAR_S, "description": "Seconds from now."},
    "run_at": _told(_TIME, "When it is due, at most 365 days ahead; what has passed means now."),
    "scheduled_at": _told(_TIME, "The same as `run_at`."),
    "max_attempts": {"type": "integer", "minimum": 1, "maximum": 100},
    "timeout": _told(_SPAN, "Seconds of one run, at most those of the type."),
    "expires_in": _told(_SPAN, "Not started within so many seconds: `failed`, cause `expired`."),
    "unique_key": {
        "type": "string",
        "minLength": 1,
        "maxLength": names.MAX_UNIQUE_KEY,
        "description": "Printable characters. With the same body the first job is answered again.",
    },
    "unique_while": {"type": "string", "enum": list(submit.UNIQUE_WHILE), "default": "retained"},
    "tags": {
        "type": "array",
        "maxItems": submit.MAX_TAGS,
        "items": {"type": "string", "minLength": 1, "maxLength": names.MAX_TAG},
    },
    "meta": _told(_OBJECT, f"Up to {submit.MAX_META} bytes as compact JSON."),
    "notify": {"not": {}, "description": "Comes with webhooks; refused until then."},
}
_ONE_OF_THEM = [["delay", "run_at"], ["delay", "scheduled_at"], ["run_at", "scheduled_at"]]

_RATE: Schema = {"type": "number", "exclusiveMinimum": 0, "maximum": keyask.MAX_RATE}
_BURST: Schema = {"type": "integer", "minimum": 1, "maximum": keyask.MAX_RATE}
_CHANGES: Mapping[str, Schema] = {
    "name": {
        "type": "string",
        "minLength": 1,
        "maxLength": names.MAX_KEY_NAME,
        "description": "Printable characters.",
    },
    "description": {"type": ["string", "null"], "maxLength": keyask.MAX_DESCRIPTION},
    "scopes": _SCOPES,
    "types": {
        "type": ["array", "null"],
        "items": _TYPE,
        "minItems": 1,
        "maxItems": 1000,
        "description": "The job types that it may use; null is every type.",
    },
    "expires_at": _told(_or_null(_TIME), "Ahead; null is never."),
    "max_pending": {
        "type": ["integer", "null"],
        "minimum": 0,
        "maximum": 2**31 - 1,
        "description": "Jobs of its client that may wait; beyond it submits get `backlog_full`.",
    },
}
_NEW_KEY: Mapping[str, Schema] = {
    **_CHANGES,
    "prefix": {"type": "string", "pattern": f"^{names.PREFIX.pattern}$", "default": keyask.DEFAULT_PREFIX},
    "client": _told(_UUID, "The client that it joins; without it the key makes one of its own."),
    "rate_limit": _told(_body({"rate": _RATE, "burst": _BURST}, minProperties=1), "Requests a second."),
}

_KEY_REST: Mapping[str, Schema] = {
    "revoked_at": _or_null(_TIME),
    "description": _or_null(_TEXT),
    "prefix": _TEXT,
    "public_id": _told(_TEXT, "The part of the key that is no secret."),
    "client": _UUID,
    "rotated_from": _told(_or_null(_UUID), "The key that this one came in place of."),
    "scopes": _SCOPES,
    "types": {"type": ["array", "null"], "items": _TYPE},
    "max_pending": {"type": ["integer", "null"]},
    "rate_limit": _closed({"rate": {"type": ["number", "null"]}, "burst": {"type": ["integer", "null"]}}),
}
_MADE_KEY: Mapping[str, Schema] = {
    "id": _UUID,
    "name": _TEXT,
    "key": _told(_TEXT, "The key itself, this once."),
    "created_at": _TIME,
    "warning": _TEXT,
    "expires_at": _or_null(_TIME),
    **_KEY_REST,
}
_ERROR: Mapping[str, Schema] = {
    "message": _TEXT,
    "error": {"type": "string", "enum": list(STATUS)},
    "fields": {"type": "array", "items": _closed({"path": _TEXT, "problem": _TEXT})},
    "request_id": _TEXT,
}
_CHECKS = _closed({"database": _TEXT, "schema": _TEXT, "workers": _TEXT})

SCHEMAS: Mapping[str, Schema] = {
    "Error": _closed({**_ERROR, "job_id": _UUID}, optional=("job_id",)),
    "Health": _closed({"message": {"const": "ok"}}),
    "Ready": _closed({"message": _TEXT, "checks": _CHECKS}),
    "NotReady": _closed({"message": _TEXT, "checks": _CHECKS, **_ERROR}),
    "Document": _told(_OBJECT, "This document."),
    "Page": _TEXT,
    "SubmitJob": _body(
        _SUBMIT, ("type", "payload"), **{"not": {"anyOf": [{"required": both} for both in _ONE_OF_THEM]}}
    ),
    "SubmittedJob": _closed(
        {
            "message": _TEXT,
            "id": _told(_TEXT, "`Message of id: ` and the id."),
            "job_id": _UUID,
            "status": _STATUS,
            "scheduled_at": _TIME,
            "duplicate": {"type": "boolean"},
            "warnings": {"type": "array", "items": _TEXT},
            "attempts": _told({"type": "integer"}, "From here on: with `?wait=` alone."),
            "error_message": _or_null(_TEXT),
            "result": _ANY,
            "started_at": _or_null(_TIME),
            "finished_at": _or_null(_TIME),
        },
        optional=("attempts", "error_message", "result", "started_at", "finished_at"),
    ),
    "SubmitBulk": _body(
        {
            "jobs": _told(
                {"type": "array", "items": _ref("SubmitJob"), "minItems": 1, "maxItems": submit.MOST_JOBS},
                "As NDJSON: these objects, one a line.",
            )
        },
        ("jobs",),
    ),
    "SubmittedBulk": _closed(
        {
            "message": _TEXT,
            "accepted": {"type": "integer"},
            "jobs": {
                "type": "array",
                "items": _closed({"job_id": _UUID, "duplicate": {"type": "boolean"}}),
            },
            "warnings": {"type": "array", "items": _TEXT},
        }
    ),
    "Run": _closed(
        {
            "attempt": {"type": "integer"},
            "claim": _or_null(_TEXT),
            "node": _or_null(_TEXT),
            "started_at": _or_null(_TIME),
            "ended_at": _TIME,
            "cause": {"type": "string", "enum": [cause.value for cause in Cause]},
            "error": _or_null(_TEXT),
            "exit_code": {"type": ["integer", "null"]},
            "signal": {"type": ["integer", "null"]},
            "cpu_s": {"type": ["number", "null"]},
            "max_rss": {"type": ["integer", "null"]},
        }
    ),
    "Job": _closed(
        {
            "id": _UUID,
            "type": _TYPE,
            "payload": _OBJECT,
            "status": _STATUS,
            "attempts": {"type": "integer"},
            "max_attempts": {"type": "integer"},
            "created_at": _TIME,
            "scheduled_at": _told(_TIME, "When it is due."),
            "error_message": _or_null(_TEXT),
            "result": _told(_ANY, "What the handler returned."),
            "progress": _ANY,
            "priority": {"type": "integer"},
            "started_at": _or_null(_TIME),
            "finished_at": _or_null(_TIME),
            "unique_key": _or_null(_TEXT),
            "tags": {"type": "array", "items": _TEXT},
            "meta": _OBJECT,
            "history": _told(
                {"type": "array", "items": _ref("Run")}, "Runs that did not complete; empty in lists."
            ),
            "waiting_for": _ANY,
        }
    ),
    "Jobs": _closed({"jobs": {"type": "array", "items": _ref("Job")}, "next_cursor": _or_null(_TEXT)}),
    "NewKey": _body(_NEW_KEY, ("name",)),
    "ChangeKey": _body(
        {
            **_CHANGES,
            "rate_limit": {
                "type": ["object", "null"],
                "properties": {"rate": _or_null(_RATE), "burst": _or_null(_BURST)},
                "additionalProperties": False,
                "minProperties": 1,
                "description": "Null sets both, or one of them, back to the default.",
            },
        }
    ),
    "RotateKey": _body(
        {
            "overlap": _told(
                {"type": "string", "default": "24h", "examples": ["24h", "0s"]},
                f"How long the old key goes on, at most {keyask.MAX_OVERLAP.days}d.",
            ),
            "expires_at": _told(
                _or_null(_TIME), "Of the new key. Without it, it lives as long as the old one was made for."
            ),
        }
    ),
    "Key": _closed(
        {
            "id": _UUID,
            "name": _TEXT,
            "key_hash": _told(
                {"type": "string", "pattern": "^fp_[0-9a-f]{12}$"}, "A fingerprint, not the stored digest."
            ),
            "created_at": _TIME,
            "last_used_at": _or_null(_TIME),
            "expires_at": _or_null(_TIME),
            **_KEY_REST,
        }
    ),
    "Keys": _closed({"Message": _TEXT, "Keys": {"type": "array", "items": _ref("Key")}}),
    "MadeKey": _closed(_MADE_KEY),
    "RotatedKey": _closed({**_MADE_KEY, "replaces": _closed({"id": _UUID, "expires_at": _TIME})}),
    "AuditEntry": _closed(
        {
            "id": _TEXT,
            "at": _TIME,
            "actor": _told(_TEXT, "`admin`, `cli:USER` or the id of a client."),
            "action": _told(_TEXT, "What was done, like `key.revoke`."),
            "target": _or_null(_TEXT),
            "address": _or_null(_TEXT),
            "request_id": _or_null(_TEXT),
            "detail": _OBJECT,
        }
    ),
    "Audit": _closed(
        {"entries": {"type": "array", "items": _ref("AuditEntry")}, "next_cursor": _or_null(_TEXT)}
    ),
}
"""All named schemas."""

_WAIT = Parameter(
    name="wait",
    schema={"type": "number", "minimum": 0, "maximum": 60},
    text="Seconds to hold the answer until the job is finished.",
)
_CURSOR = Parameter(name="cursor", schema=_TEXT, text="The `next_cursor` of the answer before.")
_LIMIT = Parameter(
    name="limit",
    schema={"type": "integer", "minimum": 1, "maximum": 200, "default": 50},
    text="How many at most.",
)
_IDEMPOTENCY = Parameter(
    name=submit.HEADER, schema=_SUBMIT["unique_key"], text="The same as `unique_key`.", place="header"
)
_FILTERS = (
    Parameter(name="status", schema=_STATUS, text="Only these."),
    Parameter(name="type", schema=_TYPE, text="Only these."),
    Parameter(name="tag", schema=_SUBMIT["tags"]["items"], text="Only these."),
    Parameter(name="unique_key", schema=_SUBMIT["unique_key"], text="Only this one."),
    Parameter(name="since", schema=_TIME, text="Created then or later."),
    Parameter(name="until", schema=_TIME, text="Created before."),
)
_OF_SUBMIT = ("exclusive_fields", "unknown_type", "invalid_payload", "conflict", "backlog_full", "not_ready")

SHAPES: Mapping[str, Shape] = {
    "GET /health": Shape(group="Service", answer="Health"),
    "GET /ready": Shape(group="Service", answer="Ready", codes=("not_ready",), refusals={503: "NotReady"}),
    "GET /openapi.json": Shape(group="Service", answer="Document"),
    "GET /docs": Shape(group="Service", answer="Page", kinds=("text/html",)),
    "GET /docs/{file}": Shape(
        group="Service", answer="Page", kinds=("text/css", "text/javascript", "image/svg+xml")
    ),
    "POST /jobs": Shape(
        group="Jobs",
        answer="SubmittedJob",
        body="SubmitJob",
        parameters=(_WAIT, _IDEMPOTENCY),
        codes=_OF_SUBMIT,
        location=True,
    ),
    "POST /jobs/bulk": Shape(
        group="Jobs",
        answer="SubmittedBulk",
        body="SubmitBulk",
        body_kinds=("application/json", "application/x-ndjson"),
        codes=_OF_SUBMIT,
    ),
    "GET /jobs": Shape(
        group="Jobs",
        answer="Jobs",
        parameters=(*_FILTERS, _LIMIT, _CURSOR),
        codes=("unknown_field",),
    ),
    "GET /jobs/{id}": Shape(group="Jobs", answer="Job", parameters=(_WAIT,)),
    "POST /admin/api-keys": Shape(group="API keys", answer="MadeKey", status=201, body="NewKey"),
    "GET /admin/api-keys": Shape(group="API keys", answer="Keys"),
    "GET /admin/api-keys/{id}": Shape(group="API keys", answer="Key"),
    "PATCH /admin/api-keys/{id}": Shape(
        group="API keys", answer="Key", body="ChangeKey", codes=("conflict",)
    ),
    "DELETE /admin/api-keys/{id}": Shape(group="API keys", answer=None, status=204),
    "POST /admin/api-keys/{id}/rotate": Shape(
        group="API keys", answer="RotatedKey", status=201, body="RotateKey", codes=("conflict",)
    ),
    "GET /admin/audit": Shape(
        group="Audit", answer="Audit", parameters=(_LIMIT, _CURSOR), codes=("unknown_field",)
    ),
}
"""Each route by its method and path."""
