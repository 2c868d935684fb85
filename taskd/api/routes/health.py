"""Whether the process lives, and whether it can do its work."""

from __future__ import annotations

from taskd.api import answers
from taskd.api.answers import Answer
from taskd.api.route import Call, Route


async def health(call: Call) -> Answer:
    """Say that the process lives, whatever the database does."""
    return answers.ok({"message": "ok"})


async def ready(call: Call) -> Answer:
    """Say whether requests can be served: database and schema decide, workers inform."""
    return answers.ready(await call.services.health.ready(), call.request.door_id)


ROUTES = (
    Route(method="GET", path="/health", run=health),
    Route(method="GET", path="/ready", run=ready),
)
