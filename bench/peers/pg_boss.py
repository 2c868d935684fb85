"""pg-boss (Node.js): rows are kept for 7 days (its default), no result is stored for a batch.

Its manual, pages "Workers" and "Queues": `batchSize` fetches and completes many jobs at once,
`burstWhenBatchFull` fetches on without a pause while batches come back full, `localConcurrency` runs several
workers in a process, `useListenNotify` with the queue's `notify` starts jobs within milliseconds; page
"Jobs": `insert()` creates many jobs in one request. Producers run without `supervise` and `schedule`,
which page "Constructor" allows. It names no numbers: 5000 a batch and two workers in one process had the
lowest CPU a job and the best rate of 500 to 5000, one to three workers and one or two processes.
"""

from __future__ import annotations

from bench.peers.jobs import JobPeer

PEER = JobPeer(
    "pg-boss",
    "12.38.0",
    packages=["pg-boss@12.38.0", "pg@8.23.1"],
    program="pg_boss.cjs",
    unfinished="exists (select from pgboss.job where state < 'completed')",
    span="select extract(epoch from max(completed_on) - min(started_on)) from pgboss.job",
    processes=1,
)
