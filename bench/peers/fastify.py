"""Fastify with pg (Node.js): a plain server, one durable INSERT a POST.

Fastify's manual, page "Getting Started": a schema of the body is checked, a schema of the answer makes
writing it faster; page "Recommendations": one process a core or less. node-postgres' manual, page "Pool
Sizing": leave `max` at 10 (the best here) or set 20 to 25 when queries are many and short; page
"Queries": a `name` prepares the statement once a connection; page "Pipelining": no effect on
`pool.query`.
"""

from __future__ import annotations

from bench.peers.http import HttpPeer

PEER = HttpPeer(
    "fastify",
    "5.12.8",
    packages=["fastify@5.12.8", "pg@8.23.1"],
    program="fastify.cjs",
    pool_size=10,
)
