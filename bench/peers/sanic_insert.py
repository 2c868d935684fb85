"""Sanic with a psycopg pool (Python): a plain server, one durable INSERT a POST.

Sanic's manual, page "Running Sanic": a worker a processor; here one process, as taskd's API and the other
servers have, since the database and the load client share the cores. Page "Logging": no access log, for
speed; uvloop comes with Sanic. psycopg's manual, page "Connection pools": an `AsyncConnectionPool` opened
when the server starts; page "Prepared statements": a statement is prepared by itself after five
executions; page "Installation": the C implementation, here of the binary package. It names no size: 32
connections, one a client, were the best of 4 to 32.
"""

from __future__ import annotations

from bench.peers.http import HttpPeer

PEER = HttpPeer(
    "sanic-insert",
    "25.12.1",
    packages=["sanic==25.12.1", "psycopg[binary,pool]==3.3.9"],
    program="sanic_insert",
    pool_size=32,
)
