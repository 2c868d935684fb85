"""Jobs, moves, verdicts, backoff, buckets: pure values and arithmetic, no I/O."""
