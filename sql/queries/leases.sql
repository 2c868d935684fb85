-- Statements of the daemon: claims, verdicts, rescue. The hot ones are functions of migration 0001, so
-- that their inner plans are made once a session, also behind a pooler that forgets prepared statements.

-- name: claim_jobs
-- moves: pending -> processing
select * from taskd.claim(
    %(node)s, %(claim)s, %(types)s, %(priorities)s, %(wants)s, %(aheads)s, %(pools)s, %(budgets)s,
    %(floor_at)s, %(floor_id)s, %(served)s);

-- name: settle_completed
-- moves: processing -> completed
select taskd.settle_completed(%(node)s, %(ids)s, %(claims)s, %(results)s, %(ran_ms)s);

-- name: settle_others
-- moves: processing -> scheduled | pending | completed | failed | cancelled
select id::text from taskd.settle_others(
    %(node)s, %(ids)s, %(claims)s, %(status)s, %(delays_ms)s, %(counts)s, %(causes)s, %(errors)s,
    %(results)s, %(ran_ms)s, %(exit_codes)s, %(signals)s, %(cpu_s)s, %(max_rss)s, %(crashes)s,
    %(alone)s) as id;

-- name: settled_by
-- Which of these jobs are no longer processing and still carry the claim: their settle was stored and
-- only its answer was lost. The rest is fenced.
select v.id::text
from unnest(%(ids)s::uuid[], %(claims)s::bigint[]) as v (id, claim)
-- A rescue writes down the claims that it takes away, at the very moment at which it marks the node dead:
-- that is no settle.
cross join (
    select (select n.ended_at from taskd.nodes as n where n.id = %(node)s and n.state = 'dead') as at
) as rescue
cross join lateral (
    -- Under a limit, so that it stays one look by id for each job, whatever the sizes.
    select true as stored from taskd.outcomes as o
    where o.id = v.id and o.node = %(node)s and o.claim = v.claim
        and o.finished_at is distinct from rescue.at
    union all
    select true from taskd.queue as q
    where q.id = v.id and not q.claimed and q.node = %(node)s and q.claim = v.claim
    union all
    select true from taskd.history as h
    where h.job_id = v.id and h.node = %(node)s and h.claim = v.claim
        and h.ended_at is distinct from rescue.at
    limit 1
) as found
where found.stored;

-- name: put_back_unanswered
-- moves: processing -> scheduled | pending
-- Rows of this node whose claim's answer was lost: nobody runs them. Looks through a part of the queue; it
-- runs only after a connection broke in the middle of a claim. Says too how many blocks the queue has.
with back as (
    update taskd.queue as q
    set claimed = false, node = null, claim = null, started_at = null, run_at = taskd.moment()
    where q.ctid >= format('(%%s,0)', %(first)s::bigint)::tid
        and q.ctid < format('(%%s,0)', %(last)s::bigint)::tid
        and q.claimed and q.node = %(node)s and q.claim = any(%(claims)s)
    returning q.type, q.counted
), counted as (
    update taskd.running as r set jobs = greatest(0, r.jobs - c.jobs)
    from (select b.type, count(*)::integer as jobs from back as b where b.counted group by b.type) as c
    where r.type = c.type and r.node = %(node)s
)
select count(*), pg_relation_size('taskd.queue') / current_setting('block_size')::bigint from back;

-- name: own_claims
-- What this node runs by the word of the database, of its claims up to the last that was answered; looks
-- through a part of the queue. One row at least, with the number of the queue's blocks.
select s.blocks, q.id::text, q.claim, q.type, q.attempts, q.max_attempts, q.crashes, q.alone
from (select pg_relation_size('taskd.queue') / current_setting('block_size')::bigint as blocks) as s
left join taskd.queue as q on q.ctid >= format('(%%s,0)', %(first)s::bigint)::tid
    and q.ctid < format('(%%s,0)', %(last)s::bigint)::tid
    and q.claimed and q.node = %(node)s and q.claim <= %(answered)s;

-- name: rescue_lost
-- moves: processing -> pending | failed
select dead, jobs, failed, more
from taskd.rescue(null, 'lease_expired', %(error)s, %(about)s::timestamptz, %(within)s::interval);

-- name: rescue_named
-- moves: processing -> pending | failed
select dead, jobs, failed, more from taskd.rescue(%(nodes)s, %(cause)s, %(error)s);

-- name: bring_forward
-- Jobs that were due when they were stored and are not due any more, because the clock went back since. What
-- was meant for later stays: it is told from these by the time at which it was stored.
with late as (
    select w.tid
    from (select distinct l.type, l.priority from taskd.lanes as l) as lane
    cross join lateral (
        select q.ctid as tid from taskd.queue as q join taskd.jobs as j on j.id = q.id
        where q.type = lane.type and q.priority = lane.priority and not q.claimed
            and q.run_at > now() and q.run_at <= %(until)s and q.run_at <= j.created_at
        order by q.run_at, q.id
        limit %(most)s
        for update of q skip locked) as w
), due as (
    update taskd.queue as q set run_at = taskd.moment()
    where q.ctid = any(array(select late.tid from late))
    returning q.id
)
select count(*) from due;

-- name: expire_jobs
-- moves: scheduled | pending -> failed
-- Also what is not due yet: it can't start in time any more.
with gone as (
    delete from taskd.queue as q
    where q.id = any(array(
        select w.id from taskd.queue as w
        where w.expires_at <= clock_timestamp() and not w.claimed
        order by w.expires_at limit %(most)s for update skip locked))
    returning q.id, q.run_at, q.attempts, q.max_attempts, q.keyed
), freed as (
    delete from taskd.unique_keys as k using gone as g join taskd.jobs as j on j.id = g.id
    where g.keyed and k.client = j.client and k.key = j.unique_key and k.job_id = j.id
), told as (
    insert into taskd.history (job_id, attempt, ended_at, cause, error)
    select g.id, g.attempts + 1, clock_timestamp(), 'expired', 'not started in time' from gone as g
)
insert into taskd.outcomes (id, finished_at, run_at, attempts, max_attempts, status, error)
select g.id, clock_timestamp(), g.run_at, g.attempts, g.max_attempts, 'failed', 'not started in time'
from gone as g
returning id::text;

-- name: floors
select * from taskd.floors(%(types)s, %(priorities)s, %(from_at)s, %(from_id)s, %(to_at)s, %(to_id)s);
