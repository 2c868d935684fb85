-- Why: the moves that people make: cancel and retry by hand, with the requests to cancel what runs.
-- Lock: none that matters, everything is new.
-- Safe with old code: yes. A node that knows no requests lets its jobs end by themselves.
--
-- roles.sql has both functions run with the owner's rights: the API changes jobs in no other way.

-- Jobs that run and are to be cancelled. Kept by job and not by claim: a job whose run ends otherwise before
-- its node has seen the request is cancelled where it waits. A row goes with the next sweep after the job's
-- end, so that no settle looks here.
create table taskd.cancel_requests (
    id uuid primary key,
    asked_at timestamptz not null
);

-- Cancels jobs: those that wait at once; for those that run the request is kept, and the holder of the claim
-- settles them. `p_client` null is anybody's. Returns for each job that is there the state it was found in,
-- and whether that is one that can be cancelled.
create function taskd.cancel_jobs(p_ids uuid[], p_client uuid)
returns table (job_id uuid, was text, done boolean)
language plpgsql
set enable_hashjoin = off set enable_mergejoin = off set enable_seqscan = off
as $$
declare
    t timestamptz;
    waiting uuid[];
    running uuid[];
begin
    -- In the order of their ids, as settles lock them. A claim passes by what is locked, and what it was
    -- about to take is seen here as it left it.
    select coalesce(array_agg(k.id) filter (where not k.claimed), '{}'),
        coalesce(array_agg(k.id) filter (where k.claimed), '{}')
    into waiting, running
    from (
        select q.id, q.claimed from taskd.queue as q
        where q.id = any(p_ids)
            and (p_client is null
                or exists (select from taskd.jobs as j where j.id = q.id and j.client = p_client))
        order by q.id
        for update of q
    ) as k;
    t := clock_timestamp();
    return query
        with gone as (
            delete from taskd.queue as q where q.id = any(waiting)
            returning q.id, q.run_at, q.attempts, q.max_attempts, q.keyed
        ), freed as (
            delete from taskd.unique_keys as k
            using gone as g join taskd.jobs as j on j.id = g.id
            where g.keyed and k.client = j.client and k.key = j.unique_key and k.job_id = j.id
        ), told as (
            insert into taskd.history (job_id, attempt, ended_at, cause, error)
            select g.id, g.attempts + 1, t, 'cancelled', 'cancelled while it waited' from gone as g
        ), ended as (
            insert into taskd.outcomes (id, finished_at, run_at, attempts, max_attempts, status, error)
            select g.id, t, g.run_at, g.attempts, g.max_attempts, 'cancelled', 'cancelled while it waited'
            from gone as g
        )
        select g.id, case when g.run_at > t then 'scheduled' else 'pending' end, true from gone as g;
    insert into taskd.cancel_requests (id, asked_at) select r.id, t from unnest(running) as r (id)
    on conflict do nothing;
    delete from taskd.cancel_requests as c
    where c.id = any(p_ids) and not exists (select from taskd.queue as q where q.id = c.id);
    return query select r.id, 'processing', true from unnest(running) as r (id);
    return query
        select j.id,
            coalesce(o.status, case
                when q.claimed then 'processing' when q.run_at > t then 'scheduled' else 'pending' end),
            false
        from taskd.jobs as j
        left join taskd.queue as q on q.id = j.id
        left join taskd.outcomes as o on o.id = j.id
        where j.id = any(p_ids) and j.id <> all(waiting || running)
            and (p_client is null or j.client = p_client)
            and (q.id is not null or o.id is not null);
end
$$;

-- Puts ended jobs back in line as they were submitted, with all their attempts: with `p_payload` instead of
-- theirs and not before `p_run_at`, where these are not null. A unique key that was free since the job's end
-- is taken again; a job whose key another one holds by now stays ended, and `held_by` names that one.
-- Returns as cancel_jobs does.
create function taskd.retry_jobs(p_ids uuid[], p_client uuid, p_run_at timestamptz, p_payload text)
returns table (job_id uuid, was text, done boolean, held_by uuid)
language plpgsql
set enable_hashjoin = off set enable_mergejoin = off set enable_seqscan = off
as $$
declare
    t timestamptz;
    ended uuid[];
    held uuid[];
begin
    ended := array(
        select o.id from taskd.outcomes as o
        where o.id = any(p_ids)
            and (p_client is null
                or exists (select from taskd.jobs as j where j.id = o.id and j.client = p_client))
        order by o.id
        for update of o);
    -- By key, so that two transactions with the same keys can't block each other crosswise.
    with asked as (
        select j.id, j.client, j.unique_key, j.key_hash from taskd.jobs as j
        where j.id = any(ended) and j.key_hash is not null
        order by j.client, j.unique_key, j.id
    ), taken as (
        insert into taskd.unique_keys as k (client, key, job_id, body_hash)
        select a.client, a.unique_key, a.id, a.key_hash from asked as a
        on conflict do nothing
        returning k.job_id
    )
    select coalesce(array_agg(a.id), '{}') into held
    from asked as a
    where a.id not in (select k.job_id from taken as k);
    -- Not earlier: we may have waited for a lock or a key, and floors go on meanwhile.
    t := taskd.moment();
    return query
        with gone as (
            delete from taskd.outcomes as o where o.id = any(ended) and o.id <> all(held)
            returning o.id, o.status, o.attempts, o.node, o.claim
        ), told as (
            -- A run that completed stands nowhere else from now on: a settle that is sent again, because its
            -- answer was lost, is known by the claim here.
            insert into taskd.history (job_id, attempt, node, claim, ended_at, cause, error)
            select g.id, g.attempts, case when g.status = 'completed' then g.node end,
                case when g.status = 'completed' then g.claim end, t, 'retried',
                'put back in line by hand; it was ' || g.status
            from gone as g
        ), changed as (
            update taskd.jobs as j set payload = p_payload::json
            where p_payload is not null and j.id = any(array(select g.id from gone as g))
        ), unasked as (
            delete from taskd.cancel_requests as c where c.id = any(array(select g.id from gone as g))
        ), again as (
            insert into taskd.queue (id, run_at, priority, max_attempts, keyed, type)
            select j.id, greatest(t, p_run_at), j.priority, j.max_attempts, j.key_hash is not null, j.type
            from gone as g join taskd.jobs as j on j.id = g.id
        )
        select g.id, g.status, true, null::uuid from gone as g;
    return query
        select j.id,
            coalesce(o.status, case
                when q.claimed then 'processing' when q.run_at > t then 'scheduled' else 'pending' end),
            false, k.job_id
        from taskd.jobs as j
        left join taskd.queue as q on q.id = j.id
        left join taskd.outcomes as o on o.id = j.id
        left join taskd.unique_keys as k
            on j.id = any(held) and k.client = j.client and k.key = j.unique_key
        where j.id = any(p_ids) and (j.id <> all(ended) or j.id = any(held))
            and (p_client is null or j.client = p_client)
            and (q.id is not null or o.id is not null);
end
$$;
