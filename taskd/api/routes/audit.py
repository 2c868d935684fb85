"""The audit log, for operators."""

from __future__ import annotations

import re

from taskd.api import answers
from taskd.api.answers import Answer
from taskd.api.route import Call, Route
from taskd.errors import Refused

MOST_LISTED = 200
LISTED = 50

_COUNT = re.compile(r"[0-9]{1,4}")
_CURSOR = re.compile(r"[0-9]{1,18}")


async def list_(call: Call) -> Answer:
    """Show who did what, newest first."""
    query = call.query()
    for name in query:
        if name not in ("limit", "cursor"):
            raise Refused.field("unknown_field", name[:64], "is no parameter of this list")
    limit = LISTED
    if "limit" in query:
        limit = int(query["limit"]) if _COUNT.fullmatch(query["limit"]) else 0
        if not 1 <= limit <= MOST_LISTED:
            raise Refused.field("invalid_field", "limit", f"must be a whole number from 1 to {MOST_LISTED}")
    before = None
    if "cursor" in query:
        if not _CURSOR.fullmatch(query["cursor"]):
            raise Refused.field("invalid_field", "cursor", "is not a next_cursor of this list")
        before = int(query["cursor"])
    page = await call.services.audit.page(before=before, limit=limit, until=call.until)
    return answers.ok(
        {
            "entries": [answers.audit(entry) for entry in page.entries],
            "next_cursor": None if page.before is None else str(page.before),
        }
    )


ROUTES = (Route(method="GET", path="/admin/audit", run=list_, admin=True),)
