"""What the OpenAPI document says may be sent, and what it does not: no 5xx, and answers as described.

schemathesis makes the requests. `TASKD_FUZZ_INPUTS` sets how many for each route; the long run (`make
fuzz`) takes other ones each time, the short one the same.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psycopg

from tests.api.server import ADMIN, make_key, publish, running, settings

CHECKS = (
    *("not_a_server_error", "response_schema_conformance", "status_code_conformance"),
    *("content_type_conformance", "response_headers_conformance"),
)
INPUTS = int(os.environ.get("TASKD_FUZZ_INPUTS", "300"))
LONG = 100_000
"""From so many inputs on it is a long run; a request costs a thousand times what a parser's input does."""


async def test_the_api_keeps_to_its_document(
    database_url: str, db: psycopg.AsyncConnection, tmp_path: Path
) -> None:
    await publish(db)
    key, _ = await make_key(
        db, rate=100_000, burst=100_000, scopes=["jobs:write", "jobs:read", "jobs:cancel"]
    )
    few = ("--max-examples", "10", "--generation-deterministic")
    with running(settings(database_url)) as server:
        address, children = f"http://127.0.0.1:{server.port}", server.children()
        words = ["--url", address, "--checks", ",".join(CHECKS), "--continue-on-failure", "--no-color"]
        words += ["-H", f"X-API-Key: {key}", "-H", f"Authorization: Bearer {ADMIN}"]
        words += ["--phases", "examples,coverage,fuzzing", "--suppress-health-check", "all"]
        words += ["--max-response-time", "8"]  # `?wait=` holds an answer back
        words += few if INPUTS < LONG else ("--max-examples", str(INPUTS // 1000))
        done = subprocess.run(
            [Path(sys.executable).with_name("schemathesis"), "run", f"{address}/openapi.json", *words],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )

        assert done.returncode == 0, done.stdout[-6000:]
        assert server.children() == children
