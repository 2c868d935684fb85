-- Moves that people make. Both are functions of migration 0005, which the API may call and whose tables it may
-- not change.

-- name: cancel_jobs
-- moves: scheduled | pending -> cancelled
-- Of a job that is processing it keeps the request; the holder of the claim settles that.
select job_id, was, done from taskd.cancel_jobs(%(ids)s, %(client)s);

-- name: retry_jobs
-- moves: completed | failed | cancelled -> scheduled | pending
select job_id, was, done, held_by from taskd.retry_jobs(%(ids)s, %(client)s, %(run_at)s, %(payload)s);

-- name: asked_to_cancel
-- What a node is to stop: as a rule the table is empty, and this is one look at nothing.
select q.id::text, q.claim
from taskd.cancel_requests as c
-- Under a limit, so that it stays one look by id for each request, whatever the sizes.
cross join lateral (
    select w.id, w.claim from taskd.queue as w
    where w.id = c.id and w.claimed and w.node = %(node)s
    limit 1
) as q;

-- name: cancel_requested
-- moves: scheduled | pending -> cancelled
-- Requests whose job does not run any more: it is cancelled if it waits; if it has ended the request goes.
select count(*) filter (where k.done)
from (
    select array_agg(c.id) as ids from taskd.cancel_requests as c
    where not exists (
        select from taskd.queue as q where q.id = c.id and q.claimed offset 0)
) as r
cross join lateral taskd.cancel_jobs(r.ids, null) as k
where r.ids is not null;
