"""pgqueuer (Python): rows of the queue are deleted when done, two lines a job stay in its log table.

Its manual, page "Performance Tuning": a larger `batch_size` for short jobs, `AsyncpgPoolDriver` for producers
and a single connection for the `QueueManager`, `pgq autovac` after installation; `durability` stays
`durable`, which is the default and what taskd promises; page "Heartbeat Monitoring": `heartbeat_timeout` is
30 s by default; page "Benchmarks": asyncpg is the faster driver, and several consumers. uvloop, as `pgq run`
uses. Batches of 1000 and two processes were the best of 100 to 5000 and one to three.
"""

from __future__ import annotations

from bench.peers.jobs import JobPeer

PEER = JobPeer(
    "pgqueuer",
    "1.6.0",
    packages=["pgqueuer==1.6.0", "asyncpg==0.32.0", "uvloop==0.23.0"],
    program="pgqueuer",
    unfinished="exists (select from pgqueuer)",
    span="select extract(epoch from max(created) - min(created) filter (where status = 'picked')) "
    "from pgqueuer_log",
    processes=2,
)
