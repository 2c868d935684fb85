"""Procrastinate (Python): rows are deleted when done.

Its manual, page "Execute multiple jobs at the same time": `concurrency=30`, several worker processes;
Discussions, "Mind the size of your PostgreSQL pool": as many connections as the concurrency plus one for
short jobs; page "Delete finished jobs": `delete_jobs="always"`; page "Batch defer multiple jobs":
`batch_defer_async`. Of psycopg the C implementation, from its binary package.
"""

from __future__ import annotations

from bench.peers.jobs import JobPeer

PEER = JobPeer(
    "procrastinate",
    "3.10.0",
    packages=["procrastinate==3.10.0", "psycopg[binary,pool]==3.3.9"],
    program="procrastinate",
    unfinished="exists (select from procrastinate_jobs where status in ('todo', 'doing'))",
    processes=2,
    share=0.1,
)
