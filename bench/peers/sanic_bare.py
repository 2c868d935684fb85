"""A bare Sanic route (Python) that reads the JSON of a POST and stores nothing.

One process, without access log; uvloop comes with Sanic (see sanic_insert.py).
"""

from __future__ import annotations

from bench.peers.http import HttpPeer

PEER = HttpPeer(
    "sanic-bare",
    "25.12.1",
    packages=["sanic==25.12.1"],
    program="sanic_bare",
)
