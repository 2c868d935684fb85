"""A real API for tests: `python -m tests.api.standalone`, with its settings as JSON on standard input."""

from __future__ import annotations

import asyncio
import os
import sys

from taskd.api.serve import serve
from taskd.api.settings import ApiSettings
from taskd.obs.log import setup

if __name__ == "__main__":
    setup("info", "json", sys.stderr, {})
    sys.exit(asyncio.run(serve(ApiSettings.decode(sys.stdin.buffer.read()), os.environ)))
