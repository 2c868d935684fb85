-- Jobs as clients and operators see them.

-- name: insert_jobs
select id::text, held_by::text, same, (extract(epoch from at) * 1000000)::bigint from taskd.insert_jobs(
    %(ids)s, %(clients)s, %(types)s, %(payloads)s, %(priorities)s, %(max_attempts)s, %(delays_ms)s,
    %(timeouts_ms)s, %(expires_ms)s, %(extras)s);

-- name: notify_lanes
-- Outside every submit transaction: NOTIFY takes one lock for the whole server at commit.
select pg_notify(%(channel)s, lane) from unnest(%(lanes)s::text[]) as lane;

-- name: get_job
select j.id, j.client, j.type, j.payload::text as payload,
    coalesce(o.status, case
        when q.claimed then 'processing'
        when q.run_at > clock_timestamp() then 'scheduled'
        else 'pending' end) as status,
    coalesce(o.attempts, q.attempts + q.claimed::integer)::integer as attempts,
    coalesce(o.max_attempts, q.max_attempts)::integer as max_attempts,
    j.created_at, coalesce(o.run_at, q.run_at) as run_at,
    case when o.id is null then q.error else o.error end as error_message,
    o.result::text as result, null::text as progress, j.priority::integer as priority,
    coalesce(o.started_at, q.started_at) as started_at, o.finished_at, j.unique_key,
    coalesce(j.tags, '{}') as tags, j.meta::text as meta, taskd.history_of(j.id)::text as history
from taskd.jobs as j
left join taskd.queue as q on q.id = j.id
left join taskd.outcomes as o on o.id = j.id
where j.id = %(id)s and (%(client)s::uuid is null or j.client = %(client)s)
    and (q.id is not null or o.id is not null);

-- name: statuses
-- For those who wait for the end of jobs: one statement for all of them.
select v.id::text, coalesce(o.status, case when q.claimed then 'processing' else 'pending' end) as status
from unnest(%(ids)s::uuid[]) as v (id)
-- Under a limit, so that it stays one look by id for each job, whatever the sizes.
left join lateral (select w.claimed from taskd.queue as w where w.id = v.id limit 1) as q on true
left join lateral (select e.status from taskd.outcomes as e where e.id = v.id limit 1) as o on true;

-- name: list_jobs
-- Reads at most :scan rows, newest first; filters that no index serves cut the answer, not the scan.
select j.id, j.client, j.type, j.payload::text as payload, s.status,
    coalesce(o.attempts, q.attempts + q.claimed::integer)::integer as attempts,
    coalesce(o.max_attempts, q.max_attempts)::integer as max_attempts,
    j.created_at, coalesce(o.run_at, q.run_at) as run_at,
    case when o.id is null then q.error else o.error end as error_message,
    o.result::text as result, null::text as progress, j.priority::integer as priority,
    coalesce(o.started_at, q.started_at) as started_at, o.finished_at, j.unique_key,
    coalesce(j.tags, '{}') as tags, j.meta::text as meta, '[]'::text as history
from (
    select * from taskd.jobs as k
    where k.client = %(client)s and k.id < %(before)s
    order by k.id desc limit %(scan)s
) as j
left join taskd.queue as q on q.id = j.id
left join taskd.outcomes as o on o.id = j.id
cross join lateral (
    select coalesce(o.status, case
        when q.claimed then 'processing'
        when q.run_at > clock_timestamp() then 'scheduled'
        else 'pending' end) as status
) as s
where (q.id is not null or o.id is not null)
    and (%(type)s::text is null or j.type = %(type)s)
    and (%(status)s::text is null or s.status = %(status)s)
    and (%(tag)s::text is null or %(tag)s = any(j.tags))
    and (%(unique_key)s::text is null or j.unique_key = %(unique_key)s)
    and (%(since)s::timestamptz is null or j.created_at >= %(since)s)
    and (%(until)s::timestamptz is null or j.created_at < %(until)s)
order by j.id desc
limit %(most)s;

-- name: list_all_jobs
-- The same over all clients, for operators.
select j.id, j.client, j.type, j.payload::text as payload, s.status,
    coalesce(o.attempts, q.attempts + q.claimed::integer)::integer as attempts,
    coalesce(o.max_attempts, q.max_attempts)::integer as max_attempts,
    j.created_at, coalesce(o.run_at, q.run_at) as run_at,
    case when o.id is null then q.error else o.error end as error_message,
    o.result::text as result, null::text as progress, j.priority::integer as priority,
    coalesce(o.started_at, q.started_at) as started_at, o.finished_at, j.unique_key,
    coalesce(j.tags, '{}') as tags, j.meta::text as meta, '[]'::text as history
from (
    select * from taskd.jobs as k where k.id < %(before)s order by k.id desc limit %(scan)s
) as j
left join taskd.queue as q on q.id = j.id
left join taskd.outcomes as o on o.id = j.id
cross join lateral (
    select coalesce(o.status, case
        when q.claimed then 'processing'
        when q.run_at > clock_timestamp() then 'scheduled'
        else 'pending' end) as status
) as s
where (q.id is not null or o.id is not null)
    and (%(type)s::text is null or j.type = %(type)s)
    and (%(status)s::text is null or s.status = %(status)s)
    and (%(tag)s::text is null or %(tag)s = any(j.tags))
    and (%(since)s::timestamptz is null or j.created_at >= %(since)s)
    and (%(until)s::timestamptz is null or j.created_at < %(until)s)
order by j.id desc
limit %(most)s;

-- name: list_end
-- Where a list that read :scan rows ended; no row when it came to the end.
select j.id from taskd.jobs as j
where (%(client)s::uuid is null or j.client = %(client)s) and j.id < %(before)s
order by j.id desc offset %(scan)s - 1 limit 1;

-- name: prune
-- Deletes final rows whose time is over. Ids are in the order of creation, so a walk over them comes by
-- every row that may be old enough: those before :before, and those whose id a clock made that was ahead.
-- :after is where the last step of the walk ended. Old is by the time of the end and this clock alone. A row
-- with a unique key stays for a day at least. Returns how many went and where this step ended (null: start again).
with seen as materialized (
    select o.id, o.status, o.finished_at from taskd.outcomes as o
    where o.id > %(after)s and o.id < %(before)s
    order by o.id limit %(most)s
), ended as (
    -- First of all and alone in deciding: a job that is retried by hand in this moment has no outcome any
    -- more when its row is free, and keeps everything.
    delete from taskd.outcomes as o
    where o.id = any(array(
        select s.id from seen as s
        where s.finished_at < clock_timestamp() - case s.status
                when 'completed' then %(completed)s::interval
                when 'failed' then %(failed)s::interval
                else %(cancelled)s::interval end
            and not exists (
                select from taskd.jobs as j
                where j.id = s.id and j.unique_key is not null
                    and j.created_at >= clock_timestamp() - interval '1 day')))
    returning o.id
), told as (
    delete from taskd.history as h where h.job_id = any(array(select e.id from ended as e))
), asked as (
    delete from taskd.jobs as j where j.id = any(array(select e.id from ended as e))
    returning j.client, j.unique_key, j.id
), keys as (
    delete from taskd.unique_keys as k using asked as a
    where a.unique_key is not null and k.client = a.client and k.key = a.unique_key and k.job_id = a.id
)
select (select count(*) from ended) as pruned,
    case when (select count(*) from seen) = %(most)s then (select max(s.id::text)::uuid from seen as s) end as after;
