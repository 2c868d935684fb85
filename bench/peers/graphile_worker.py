"""graphile-worker (Node.js): rows are deleted when done, no result is kept.

Its manual's page "Performance" (worker.graphile.org/docs/performance) gives the configuration of its own best
figures: `concurrentJobs: 24`, `maxPoolSize: 25`, `localQueue: {size: 500}`, `completeJobBatchDelay: 0`,
`failJobBatchDelay: 0`; "Horizontal scaling" there says several processes. Page "addJobs()": batches. Its log
line for each job is off, as in its own performance test (`NO_LOG_SUCCESS`). Two processes beat one.
"""

from __future__ import annotations

from bench.peers.jobs import JobPeer

PEER = JobPeer(
    "graphile-worker",
    "0.18.0",
    packages=["graphile-worker@0.18.0", "pg@8.23.1"],
    program="graphile_worker.cjs",
    unfinished="exists (select from graphile_worker._private_jobs)",
    processes=2,
)
