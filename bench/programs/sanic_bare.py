"""A Sanic route that stores nothing. See bench/peers/sanic_bare.py."""

from __future__ import annotations

import json
import sys
import uuid

from sanic import HTTPResponse, Request, Sanic
from sanic.response import json as answer

PORT = json.loads(sys.argv[1])["port"]
app = Sanic("bare", configure_logging=False)


@app.after_server_start
async def ready(app: Sanic) -> None:  # type: ignore[type-arg]
    print(json.dumps({"ready": True}), flush=True)


@app.post("/jobs")
async def submit(request: Request) -> HTTPResponse:
    assert request.json["type"]
    return answer({"job_id": str(uuid.uuid4()), "status": "pending"})


if __name__ == "__main__":
    app.run("127.0.0.1", PORT, single_process=True, access_log=False, motd=False)
