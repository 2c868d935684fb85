-- Why: jobs, the hot queue in front of them, outcomes, history, types, limits, nodes, and the functions
--      of the hot paths. Layout and figures: docs/decisions/0001-storage.md.
-- Lock: none that matters, everything is new.
-- Safe with old code: there is none.

-- What was asked for, so all that a retry by hand needs. Written once, at submit; only `retry` with a new
-- payload ever changes a row.
create table taskd.jobs (
    id uuid not null,
    client uuid not null,
    created_at timestamptz not null default clock_timestamp(),
    priority smallint not null,
    max_attempts smallint not null,
    timeout_ms integer,
    type text collate "C" not null,
    payload json not null,
    unique_key text,
    key_hash bytea,
    tags text[],
    meta json,
    trace text
);
comment on column taskd.jobs.key_hash is 'of the body, where the unique key is free again when the job ends: a
retry by hand takes the key again';
alter table taskd.jobs alter column payload set storage extended;
create index jobs_client on taskd.jobs (client, id);
-- After the other index, here and below: by the statistics of a table that was emptied both cost the same, and
-- then the planner takes the one that was made last. The other one has the id too, at the wrong place.
alter table taskd.jobs add primary key (id);

-- What waits or runs: one narrow row a job, gone when the job ends. A waiting row with run_at ahead is
-- `scheduled`, one with run_at behind is `pending`, a claimed one is `processing`. No index has a column
-- or predicate that a claim changes, so a claim is a HOT update: that is what fillfactor 40 buys
-- (a claimed row is longer than a waiting one: at 50 one claim in seven found no room on its page).
create table taskd.queue (
    id uuid not null,
    run_at timestamptz not null,
    expires_at timestamptz,
    started_at timestamptz,
    node bigint,
    claim bigint,
    priority smallint not null,
    attempts smallint not null default 0,
    max_attempts smallint not null,
    crashes smallint not null default 0,
    claimed boolean not null default false,
    alone boolean not null default false,
    keyed boolean not null default false,
    counted boolean not null default false,
    type text collate "C" not null,
    error text
) with (
    fillfactor = 40,
    autovacuum_vacuum_scale_factor = 0.02,
    autovacuum_vacuum_threshold = 5000,
    autovacuum_vacuum_cost_delay = 0,
    autovacuum_analyze_scale_factor = 0.2,
    autovacuum_analyze_threshold = 5000
);
comment on column taskd.queue.attempts is 'attempts used up before the run that is under way';
comment on column taskd.queue.counted is 'its run stands in taskd.running: said at the claim, so that a limit that
comes or goes while it runs can not leave a count behind';
comment on column taskd.queue.keyed is 'holds a unique key that is free again when the job ends';
create index queue_lane on taskd.queue (type, priority, run_at, id);
create index queue_expires on taskd.queue (expires_at) where expires_at is not null;
alter table taskd.queue add primary key (id);

-- How jobs ended. Append-only until pruned or retried by hand.
create table taskd.outcomes (
    id uuid primary key,
    finished_at timestamptz not null,
    started_at timestamptz,
    run_at timestamptz not null,
    node bigint,
    claim bigint,
    attempts smallint not null,
    max_attempts smallint not null,
    status text collate "C" not null check (status in ('completed', 'failed', 'cancelled')),
    result json,
    error text
);

-- Runs that did not complete, each with its cause.
create table taskd.history (
    job_id uuid not null,
    attempt smallint not null,
    node bigint,
    claim bigint,
    started_at timestamptz,
    ended_at timestamptz not null,
    cause text collate "C" not null,
    error text,
    exit_code integer,
    signal integer,
    cpu_s real,
    max_rss bigint
);
create index history_job on taskd.history (job_id, ended_at);

-- Which job holds a unique key of a client.
create table taskd.unique_keys (
    client uuid not null,
    key text collate "C" not null,
    job_id uuid not null,
    body_hash bytea not null,
    created_at timestamptz not null default clock_timestamp(),
    primary key (client, key)
);

-- Each pair of type and priority that ever had a job: a claim looks into lanes, one index range each.
-- Not unique: who stores the first job of a lane would else wait for another who does so in a transaction
-- that is open for an hour. A lane that stands here twice is one lane.
create table taskd.lanes (
    type text collate "C" not null,
    priority smallint not null
);
create index lanes_lane on taskd.lanes (type, priority);

-- Nodes: one row a start of a worker daemon (an incarnation).
create table taskd.nodes (
    id bigint generated always as identity primary key,
    name text not null,
    host text not null,
    pid integer not null,
    version text not null,
    state text collate "C" not null default 'live' check (state in ('live', 'draining', 'gone', 'dead')),
    lease interval not null,
    lease_until timestamptz not null,
    heartbeat_at timestamptz not null default clock_timestamp(),
    started_at timestamptz not null default clock_timestamp(),
    ended_at timestamptz,
    search_from bigint,
    search_file oid,
    search_again boolean not null default false,
    info json not null default '{}'
) with (fillfactor = 50, autovacuum_vacuum_threshold = 500);
comment on column taskd.nodes.search_from is 'of a dead node: the block of the queue from which on its claims are
still to be looked for; null: all are found';
comment on column taskd.nodes.search_file is 'the file of the queue that this is about: VACUUM FULL makes another';
comment on column taskd.nodes.search_again is 'a claim was found that could not be taken away';

-- Job types as published: the newest publication decides defaults, node_types what live nodes accept.
create table taskd.types (
    type text collate "C" primary key,
    info json not null,
    published_at timestamptz not null default clock_timestamp(),
    published_by bigint,
    paused_at timestamptz,
    paused_until timestamptz,
    paused_reason text,
    retired_at timestamptz,
    -- What a submit needs of `info`, so that no submit parses it. Defaults as in taskd/model/jobtype.py.
    enabled boolean not null generated always as (coalesce((info->>'enabled')::boolean, true)) stored,
    priority smallint not null generated always as (coalesce((info->>'priority')::smallint, 0)) stored,
    max_attempts smallint not null
        generated always as (coalesce((info->'retry'->>'max_attempts')::smallint, 3)) stored,
    timeout double precision not null
        generated always as (coalesce((info->>'timeout')::double precision, 300)) stored
);
create table taskd.node_types (
    node bigint not null references taskd.nodes on delete cascade,
    type text collate "C" not null,
    info json not null,
    primary key (node, type)
);

-- Limits of a type over all nodes. tat: theoretical arrival time of the bucket (GCRA), microseconds of
-- Unix time by the database clock. running: jobs of a limited type that each node holds.
create table taskd.type_limits (
    type text collate "C" primary key,
    interval_us bigint,
    burst integer not null default 1,
    max_running integer,
    tat bigint not null default 0
) with (fillfactor = 50);
create table taskd.running (
    type text collate "C" not null,
    node bigint not null references taskd.nodes on delete cascade,
    jobs integer not null,
    primary key (type, node)
) with (fillfactor = 50);

-- The place of schedules; what fills it comes with them.
create table taskd.schedules (
    name text collate "C" primary key,
    spec json not null,
    next_at timestamptz,
    last_at timestamptz,
    last_job uuid,
    paused_at timestamptz
);

-- The time for a run_at that is due now. The transaction gets its number first, the clock is read after
-- that: a check of the floors (taskd.floors) then either sees this transaction under way, or its time is
-- later than the check's, however long the server leaves us waiting between the two.
create function taskd.moment() returns timestamptz
language plpgsql volatile
as $$
begin
    perform pg_current_xact_id();
    return clock_timestamp();
end
$$;

-- Stores checked jobs; one call is one transaction, all or nothing. Arrays run in parallel. `extras` holds
-- what few jobs have, as JSON or null: unique_key, unfinished, hash (hex), tags, meta, trace, run_at.
-- Returns a row for each job with a unique key that somebody holds already; all others were stored. One
-- more row, without an id, tells in `at` the time that counts as now for all of them.
create function taskd.insert_jobs(
    p_ids uuid[], p_clients uuid[], p_types text[], p_payloads text[], p_priorities smallint[],
    p_max_attempts smallint[], p_delays_ms bigint[], p_timeouts_ms integer[], p_expires_ms bigint[],
    p_extras json[]
) returns table (id uuid, held_by uuid, same boolean, at timestamptz)
language plpgsql
set enable_hashjoin = off set enable_mergejoin = off
as $$
declare
    -- Not now(): the transaction may be an application's, begun long ago (see taskd.moment).
    t timestamptz := taskd.moment();
    held uuid[] := '{}';
begin
    if p_extras is not null then
        -- Ordered by key, so that two batches with the same keys can't block each other crosswise.
        with asked as (
            select i.n, p_clients[i.n] as client, p_extras[i.n]->>'unique_key' as key,
                decode(p_extras[i.n]->>'hash', 'hex') as hash
            from generate_subscripts(p_ids, 1) as i (n)
            where p_extras[i.n]->>'unique_key' is not null
            order by 2, 3, 1
        ), taken as (
            insert into taskd.unique_keys as k (client, key, job_id, body_hash)
            select a.client, a.key, p_ids[a.n], a.hash from asked as a
            on conflict do nothing
            returning k.job_id
        )
        select coalesce(array_agg(p_ids[a.n]), '{}') into held
        from asked as a
        where p_ids[a.n] not in (select taken.job_id from taken);
        if held <> '{}' then
            -- A new statement, hence a new snapshot: the holder that made us wait is visible now.
            return query
                select p_ids[i.n], k.job_id,
                    k.body_hash = decode(p_extras[i.n]->>'hash', 'hex'), null::timestamptz
                from generate_subscripts(p_ids, 1) as i (n)
                left join taskd.unique_keys as k
                    on k.client = p_clients[i.n] and k.key = p_extras[i.n]->>'unique_key'
                where p_ids[i.n] = any(held);
        end if;
    end if;

    insert into taskd.jobs as j (id, client, created_at, priority, max_attempts, timeout_ms, type, payload,
                                 unique_key, key_hash, tags, meta, trace)
    select v.id, v.client, t, v.priority, v.max_attempts, v.timeout_ms, v.type, v.payload::json,
        v.extra->>'unique_key',
        case when (v.extra->>'unfinished')::boolean then decode(v.extra->>'hash', 'hex') end,
        case when v.extra->'tags' is not null
            then array(select json_array_elements_text(v.extra->'tags')) end,
        v.extra->'meta', v.extra->>'trace'
    from unnest(p_ids, p_clients, p_types, p_payloads, p_priorities, p_max_attempts, p_timeouts_ms, p_extras)
        as v (id, client, type, payload, priority, max_attempts, timeout_ms, extra)
    where held = '{}' or v.id <> all(held);

    insert into taskd.queue as q (id, run_at, expires_at, priority, max_attempts, keyed, type)
    select v.id,
        greatest(t, coalesce((v.extra->>'run_at')::timestamptz, t + v.delay_ms * interval '1 ms')),
        t + v.expires_ms * interval '1 ms', v.priority, v.max_attempts,
        coalesce((v.extra->>'unfinished')::boolean, false), v.type
    from unnest(p_ids, p_types, p_priorities, p_max_attempts, p_delays_ms, p_expires_ms, p_extras)
        as v (id, type, priority, max_attempts, delay_ms, expires_ms, extra)
    where held = '{}' or v.id <> all(held);

    if exists (
        select from unnest(p_types, p_priorities) as v (type, priority)
        where not exists (
            select from taskd.lanes as l where l.type = v.type and l.priority = v.priority)
    ) then
        insert into taskd.lanes (type, priority)
        select distinct v.type, v.priority from unnest(p_types, p_priorities) as v (type, priority)
        where not exists (
            select from taskd.lanes as l where l.type = v.type and l.priority = v.priority);
    end if;
    return query select null::uuid, null::uuid, null::boolean, t;
end
$$;

-- How many of `p_want` starts of a limited type are free now, taken at once; 0 when another node is just
-- counting (it skips the type this round). The count is exact: the limit's row is locked first, and the
-- next statement has a snapshot of its own, taken after the lock was granted.
-- The time is that of the transaction, which is also the start that the job's row gets: what the bucket
-- counts is what anybody can count afterwards. `counts`: starts go into taskd.running.
create function taskd.take_starts(p_type text, p_want integer)
returns table (granted integer, next_at timestamptz, counts boolean)
language plpgsql
as $$
declare
    l taskd.type_limits;
    free integer := p_want;
    now_us bigint;
    at_us bigint;
    fit integer;
begin
    select * into l from taskd.type_limits as t where t.type = p_type for update skip locked;
    if not found then
        return query select
            case when exists (select from taskd.type_limits as t where t.type = p_type) then 0 else p_want end,
            null::timestamptz, false;
        return;
    end if;
    if l.max_running is not null then
        select least(free, l.max_running - coalesce(sum(r.jobs), 0)) into free
        from taskd.running as r where r.type = p_type;
        if free <= 0 then
            return query select 0, null::timestamptz, true;
            return;
        end if;
    end if;
    if l.interval_us is not null then
        now_us := extract(epoch from now()) * 1000000;
        -- Clamped to one full bucket ahead: a clock that jumped back can't lock the type out.
        at_us := greatest(now_us, least(l.tat, now_us + l.interval_us * l.burst));
        fit := floor((now_us + l.interval_us * l.burst - at_us)::numeric / l.interval_us);
        if fit <= 0 then
            return query select 0,
                to_timestamp((at_us + l.interval_us - l.interval_us * l.burst) / 1000000.0), true;
            return;
        end if;
        free := least(free, fit);
    end if;
    return query select free, null::timestamptz, l.max_running is not null;
end
$$;

-- Counts `p_started` starts of a limited type whose limit's row this transaction holds.
create function taskd.count_starts(p_node bigint, p_type text, p_started integer)
returns void
language plpgsql
as $$
declare
    now_us bigint := extract(epoch from now()) * 1000000;
begin
    update taskd.type_limits as t
    set tat = greatest(now_us, least(t.tat, now_us + t.interval_us * t.burst)) + t.interval_us * p_started
    where t.type = p_type and t.interval_us is not null;
    insert into taskd.running as r (type, node, jobs)
    select p_type, p_node, p_started from taskd.type_limits as t
    where t.type = p_type and t.max_running is not null
    on conflict (type, node) do update set jobs = r.jobs + excluded.jobs;
end
$$;

-- Claims due jobs for a node, best lane first, all wanted types in one round trip.
-- Lanes come as parallel arrays, those of one type side by side, highest priority first; `p_wants` repeats
-- the number wanted of the type, `p_aheads` how many of these may be beyond the free slots of its pool,
-- whose number in `p_budgets` is in `p_pools`. A floor is where the last claim of the lane ended: the scan
-- starts there and not at the dead entries before it. Types with limits ask these first: which have any is
-- read here, since the strictest live node decides, and that may be another than the caller.
-- A node that was marked dead gets nothing: nobody would rescue it a second time.
-- Returns, apart by `kind`: 'job' rows; for each lane that gave jobs a 'lane' row with its new floor
-- (id, at); for p_served (null: don't look) a 'new' row for each lane of these types that the caller did not
-- name; one 'due' row: the next time at which something falls due in these lanes,
-- in `payload` the seconds until then, and in `id` this claim's time in seconds of Unix time.
create function taskd.claim(
    p_node bigint, p_claim bigint, p_types text[], p_priorities smallint[], p_wants integer[],
    p_aheads integer[], p_pools integer[], p_budgets integer[], p_floor_at timestamptz[],
    p_floor_id uuid[], p_served text[]
) returns table (
    kind text, id text, type text, payload text, priority smallint, attempts smallint,
    max_attempts smallint, crashes smallint, timeout_ms integer, alone boolean, expired boolean,
    client text, at timestamptz
)
language plpgsql
set enable_hashjoin = off set enable_mergejoin = off set enable_seqscan = off set enable_bitmapscan = off
set enable_sort = off
as $$
declare
    t constant timestamptz := now();
    tids tid[];
    got integer;
    rest integer := 0;
    wanted integer := 0;
    limited boolean := false;
    counts boolean := false;
    alive boolean := false;
    last_at timestamptz;
    last_id uuid;
    due timestamptz;
    next_due timestamptz;
    last_type text := '';
begin
    for i in 1..coalesce(cardinality(p_types), 0) loop
        if p_types[i] <> last_type then
            if limited and wanted > rest then
                perform taskd.count_starts(p_node, last_type, wanted - rest);
            end if;
            last_type := p_types[i];
            wanted := least(p_wants[i], p_budgets[p_pools[i]] + p_aheads[i]);
            limited := exists (select from taskd.type_limits as l where l.type = last_type);
            counts := false;
            if limited and wanted > 0 then
                -- Never beyond the free slots: here the claim is the start.
                select s.granted, s.next_at, s.counts into wanted, due, counts
                from taskd.take_starts(last_type, least(wanted, greatest(0, p_budgets[p_pools[i]]))) as s;
                next_due := least(next_due, due);
            end if;
            rest := wanted;
        end if;
        continue when rest <= 0;
        tids := array(
            select q.ctid from taskd.queue as q
            where q.type = p_types[i] and q.priority = p_priorities[i]
                and (q.run_at, q.id) >= (p_floor_at[i], p_floor_id[i])
                and q.run_at <= t and not q.claimed
            order by q.run_at, q.id
            limit rest
            for update skip locked);
        got := cardinality(tids);
        if got > 0 and not alive then
            -- Held to the end of this transaction: a rescue comes wholly before it, and we see it here,
            -- or wholly after it, and sees these claims.
            perform from taskd.nodes as n
            where n.id = p_node and n.state in ('live', 'draining')
            for key share;
            alive := found;
            exit when not alive;
        end if;
        if got > 0 then
            rest := rest - got;
            p_budgets[p_pools[i]] := p_budgets[p_pools[i]] - got;
            -- Before the update: afterwards this version of the row is not visible any more.
            select q.run_at, q.id into last_at, last_id from taskd.queue as q where q.ctid = tids[got];
            return query
                with took as (
                    update taskd.queue as q
                    set claimed = true, node = p_node, claim = p_claim, started_at = t, counted = counts
                    where q.ctid = any(tids)
                    returning q.id, q.attempts, q.max_attempts, q.crashes, q.alone, q.expires_at <= t as expired
                )
                select 'job', k.id::text, p_types[i], j.payload::text, p_priorities[i], k.attempts,
                    k.max_attempts, k.crashes, j.timeout_ms, k.alone, coalesce(k.expired, false),
                    j.client::text, null::timestamptz
                from took as k
                cross join lateral (  -- fenced, so that no plan begins with all jobs
                    select o.payload, o.timeout_ms, o.client from taskd.jobs as o where o.id = k.id
                    offset 0) as j;
            return query select 'lane', last_id::text, p_types[i], null::text, p_priorities[i],
                null::smallint, null::smallint, null::smallint, null::integer, null::boolean,
                null::boolean, null::text, last_at;
        end if;
        if rest > 0 then
            due := null;
            select q.run_at into due from taskd.queue as q
            where q.type = p_types[i] and q.priority = p_priorities[i] and q.run_at > t
            order by q.run_at limit 1;
            next_due := least(next_due, due);
        end if;
    end loop;
    if limited and wanted > rest then
        perform taskd.count_starts(p_node, last_type, wanted - rest);
    end if;
    if p_served is not null then
        return query select distinct 'new', null::text, l.type, null::text, l.priority, null::smallint,
            null::smallint, null::smallint, null::integer, null::boolean, null::boolean, null::text,
            null::timestamptz
        from taskd.lanes as l
        where l.type = any(p_served)
            and not exists (
                select from unnest(p_types, p_priorities) as k (type, priority)
                where k.type = l.type and k.priority = l.priority);
    end if;
    -- As a span, not as a time: the caller sleeps by its own clock.
    return query select 'due', extract(epoch from t)::text, null::text,
        extract(epoch from next_due - clock_timestamp())::text, null::smallint, null::smallint,
        null::smallint, null::smallint, null::integer, null::boolean, null::boolean, null::text,
        next_due;
end
$$;

-- Where in the queue the jobs are that `p_node` holds by these claims, side by side with `p_ids`; null for one
-- that it does not hold. Each is looked for by itself, whatever the planner believes of the queue: by the
-- statistics of an emptied one it would take the whole table for a row and join every row with every id.
create function taskd.places(p_node bigint, p_ids uuid[], p_claims bigint[]) returns tid[]
language plpgsql
set enable_seqscan = off set enable_bitmapscan = off set enable_indexscan = on
as $$
begin
    return array(
        select f.tid
        from unnest(p_ids, p_claims) with ordinality as v (id, claim, n)
        left join lateral (
            select q.ctid as tid from taskd.queue as q
            where q.id = v.id and q.claim = v.claim and q.node = p_node and q.claimed
            offset 0) as f on true
        order by v.n);
end
$$;

-- Frees the unique keys that these jobs, which have ended, hold while unfinished.
create function taskd.free_keys(p_ids uuid[]) returns void
language plpgsql
set enable_seqscan = off set enable_bitmapscan = off set enable_indexscan = on
as $$
begin
    delete from taskd.unique_keys as k
    where k.ctid = any(array(
        select f.tid
        from unnest(p_ids) as v (id)
        cross join lateral (
            select j.client, j.unique_key from taskd.jobs as j where j.id = v.id offset 0) as j
        cross join lateral (
            select w.ctid as tid from taskd.unique_keys as w
            where w.client = j.client and w.key = j.unique_key and w.job_id = v.id
            offset 0) as f));
end
$$;

-- Settles completed jobs, many at a time. A row changes only where node and claim are still the writer's.
-- `p_ran_ms` is how long each ran. No index is used below but by `places` and `free_keys`: so rows are got at
-- by their place, and no plan can do otherwise.
-- Returns the ids that were settled, or null when that is all of them: the usual answer is then no rows long.
create function taskd.settle_completed(
    p_node bigint, p_ids uuid[], p_claims bigint[], p_results text[], p_ran_ms integer[]
) returns text[]
language plpgsql
set enable_hashjoin = off set enable_mergejoin = off
set enable_seqscan = off set enable_indexscan = off set enable_bitmapscan = off
as $$
declare
    t constant timestamptz := clock_timestamp();
    tids constant tid[] := taskd.places(p_node, p_ids, p_claims);
    settled text[];
    keyed uuid[];
begin
    with gone as (
        delete from taskd.queue as q
        using unnest(tids, p_claims, p_results, p_ran_ms) as v (tid, claim, result, ran_ms)
        where q.ctid = v.tid and q.claim = v.claim and q.node = p_node and q.claimed
        returning q.id, q.type, q.run_at, q.claim, q.attempts, q.max_attempts, q.started_at, q.keyed,
            q.counted, v.result, v.ran_ms
    ), counted as (
        update taskd.running as r set jobs = greatest(0, r.jobs - c.jobs)
        from (
            select g.type, count(*)::integer as jobs from gone as g where g.counted group by g.type) as c
        where r.type = c.type and r.node = p_node
    ), ended as (
        insert into taskd.outcomes as o (id, finished_at, started_at, run_at, node, claim, attempts,
                                         max_attempts, status, result)
        select g.id, t, greatest(g.started_at, t - g.ran_ms * interval '1 ms'), g.run_at, p_node,
            g.claim, g.attempts + 1, g.max_attempts, 'completed', g.result::json
        from gone as g
    )
    select case when count(*) < cardinality(p_ids) then coalesce(array_agg(g.id), '{}')::text[] end,
        array_agg(g.id) filter (where g.keyed)
    into settled, keyed
    from gone as g;
    if keyed is not null then
        perform taskd.free_keys(keyed);
    end if;
    return settled;
end
$$;

-- Settles every other verdict. Parallel arrays; `p_status` is the final status, or null for a job that
-- waits again; `p_delays_ms` its wait; `p_counts` whether the run used up an attempt; `p_causes` makes a
-- history entry, null makes none (a job that never started is not a run, its `p_ran_ms` is null). A row
-- whose run counts keeps its claim, any other loses it. Returns the ids that were settled.
create function taskd.settle_others(
    p_node bigint, p_ids uuid[], p_claims bigint[], p_status text[], p_delays_ms bigint[],
    p_counts boolean[], p_causes text[], p_errors text[], p_results text[], p_ran_ms integer[],
    p_exit_codes integer[], p_signals integer[], p_cpu_s real[], p_max_rss bigint[],
    p_crashes smallint[], p_alone boolean[]
) returns setof uuid
language plpgsql
set enable_hashjoin = off set enable_mergejoin = off
set enable_seqscan = off set enable_indexscan = off set enable_bitmapscan = off
as $$
declare
    t constant timestamptz := taskd.moment();
    tids constant tid[] := taskd.places(p_node, p_ids, p_claims);
    settled uuid[];
    keyed uuid[];
begin
    with v as (
        select * from unnest(tids, p_claims, p_status, p_delays_ms, p_counts, p_causes, p_errors,
            p_results, p_ran_ms, p_exit_codes, p_signals, p_cpu_s, p_max_rss, p_crashes, p_alone)
            as u (tid, claim, status, delay_ms, counts, cause, error, result, ran_ms, exit_code, signal,
                  cpu_s, max_rss, crashes, alone)
    ), again as (
        update taskd.queue as q
        set claimed = false,
            -- Never before now: a floor may already have passed an older time.
            run_at = t + greatest(v.delay_ms, 0) * interval '1 ms',
            -- It was started in time; only a job that was handed back unrun can still expire.
            expires_at = case when v.cause is null then q.expires_at end,
            attempts = q.attempts + v.counts::integer,
            crashes = v.crashes,
            alone = v.alone,
            error = coalesce(v.error, q.error),
            node = case when v.counts then q.node end,
            claim = case when v.counts then q.claim end,
            started_at = case when v.counts then q.started_at end
        from v
        where q.ctid = v.tid and q.claim = v.claim and q.node = p_node and q.claimed and v.status is null
        returning q.id, q.type, q.counted, q.attempts + (not v.counts)::integer as attempt, v.claim, v.cause,
            v.error, v.ran_ms, v.exit_code, v.signal, v.cpu_s, v.max_rss
    ), gone as (
        delete from taskd.queue as q
        using v
        where q.ctid = v.tid and q.claim = v.claim and q.node = p_node and q.claimed
            and v.status is not null
        returning q.id, q.type, q.run_at, q.claim, q.attempts, q.max_attempts, q.started_at, q.keyed,
            q.counted, v.status, v.counts, v.cause, v.error, v.result, v.ran_ms, v.exit_code, v.signal,
            v.cpu_s, v.max_rss
    ), counted as (
        update taskd.running as r set jobs = greatest(0, r.jobs - c.jobs)
        from (
            select e.type, count(*)::integer as jobs
            from (select a.type, a.counted from again as a
                union all select g.type, g.counted from gone as g) as e
            where e.counted group by e.type) as c
        where r.type = c.type and r.node = p_node
    ), told as (
        insert into taskd.history as h (job_id, attempt, node, claim, started_at, ended_at, cause, error,
                                        exit_code, signal, cpu_s, max_rss)
        select e.id, e.attempt, p_node, e.claim, t - e.ran_ms * interval '1 ms', t, e.cause, e.error,
            e.exit_code, e.signal, e.cpu_s, e.max_rss
        from (
            select a.id, a.attempt, a.claim, a.cause, a.error, a.ran_ms, a.exit_code, a.signal, a.cpu_s,
                a.max_rss
            from again as a
            union all
            select g.id, g.attempts + 1, g.claim, g.cause, g.error, g.ran_ms, g.exit_code, g.signal,
                g.cpu_s, g.max_rss
            from gone as g
        ) as e
        where e.cause is not null
    ), ended as (
        insert into taskd.outcomes as o (id, finished_at, started_at, run_at, node, claim, attempts,
                                         max_attempts, status, result, error)
        select g.id, t,
            case when g.ran_ms is not null
                then greatest(g.started_at, t - g.ran_ms * interval '1 ms') end,
            g.run_at, p_node, g.claim, g.attempts + g.counts::integer, g.max_attempts, g.status,
            g.result::json, g.error
        from gone as g
    )
    select array_agg(e.id), array_agg(e.id) filter (where e.keyed)
    into settled, keyed
    from (select a.id, false as keyed from again as a union all select g.id, g.keyed from gone as g) as e;
    if keyed is not null then
        perform taskd.free_keys(keyed);
    end if;
    return query select unnest(settled);
end
$$;

-- Takes these claims, rows of the queue by place, from nodes that are marked dead. Returns (node, jobs).
create function taskd.take_away(p_nodes bigint[], p_tids tid[], p_cause text, p_error text)
returns table (dead bigint, jobs bigint)
language plpgsql
set enable_hashjoin = off set enable_mergejoin = off set enable_seqscan = off
as $$
declare
    t constant timestamptz := taskd.moment();
begin
    return query
        with held as (
            select q.ctid as tid, q.node as of_node, q.claim as of_claim, q.attempts + 1 as attempt,
                q.started_at as since, n.ended_at as lost_at,
                q.attempts + 1 >= q.max_attempts
                    or not coalesce((y.info->>'restartable')::boolean, true) as final,
                coalesce((y.info->>'restartable')::boolean, true) as restartable
            from taskd.queue as q
            join taskd.nodes as n on n.id = q.node
            left join taskd.types as y on y.type = q.type
            where q.ctid = any(p_tids) and q.claimed and q.node = any(p_nodes)
            for update of q
        ), back as (
            update taskd.queue as q
            set claimed = false, node = null, claim = null, started_at = null, attempts = q.attempts + 1,
                run_at = t, expires_at = null, error = p_error
            from held as h where q.ctid = h.tid and not h.final
            returning q.id, h.of_node, h.of_claim, h.attempt, h.since, h.lost_at, p_error as error
        ), gone as (
            delete from taskd.queue as q using held as h where q.ctid = h.tid and h.final
            returning q.id, q.run_at, q.max_attempts, q.keyed, h.of_node, h.of_claim, h.attempt, h.since,
                h.lost_at,
                case when h.restartable then p_error else 'outcome unknown: ' || p_error end as error
        ), freed as (
            delete from taskd.unique_keys as k using gone as g join taskd.jobs as j on j.id = g.id
            where g.keyed and k.client = j.client and k.key = j.unique_key and k.job_id = j.id
        ), ended as (
            insert into taskd.outcomes (id, finished_at, started_at, run_at, node, claim, attempts,
                                        max_attempts, status, error)
            select g.id, g.lost_at, g.since, g.run_at, g.of_node, g.of_claim, g.attempt, g.max_attempts,
                'failed', g.error
            from gone as g
        ), told as (
            insert into taskd.history as h (job_id, attempt, node, claim, started_at, ended_at, cause, error)
            select e.id, e.attempt, e.of_node, e.of_claim, e.since, e.lost_at, p_cause, e.error
            from (
                select b.id, b.attempt, b.of_node, b.of_claim, b.since, b.lost_at, b.error from back as b
                union all
                select g.id, g.attempt, g.of_node, g.of_claim, g.since, g.lost_at, g.error from gone as g
            ) as e
            returning h.node
        )
        select told.node, count(*) from told group by told.node;
end
$$;

-- Takes the claims of nodes whose lease has ended, or of `p_nodes`. A node is marked dead first, so that it
-- can neither renew its lease nor claim any more; what it holds is then where it is now, and is looked for
-- in the queue, `p_blocks` blocks a call (no index names the node: a claim would have to write it). As long
-- as `more` comes back true the next call goes on from there, whoever makes it. A claim that can't be taken
-- away is `failed`; it is tried again in the next round and holds up no other.
-- `p_about` is what the caller takes the time to be, from its last look at the clock: when it is not, by
-- more than `p_within`, the clock has jumped, the leases are not what they were, and nothing is done.
create function taskd.rescue(
    p_nodes bigint[], p_cause text, p_error text, p_about timestamptz default null,
    p_within interval default interval '1 s', p_blocks integer default 16384
) returns table (dead bigint, jobs bigint, failed bigint, more boolean)
language plpgsql
set enable_seqscan = off
as $$
declare
    t constant timestamptz := taskd.moment();
    file constant oid := pg_relation_filenode('taskd.queue');
    blocks constant bigint := pg_relation_size('taskd.queue') / current_setting('block_size')::bigint;
    lost bigint[];
    first bigint;
    last bigint;
    tids tid[];
    place tid;
    taken jsonb := '{}';
    bad bigint := 0;
begin
    if abs(extract(epoch from t - p_about)) > extract(epoch from p_within) then
        return;
    end if;
    -- A clock that went back leaves leases that nobody renews for longer than any lease is.
    update taskd.nodes as n set lease_until = clock_timestamp() + n.lease
    where n.state in ('live', 'draining') and n.lease_until > clock_timestamp() + n.lease + interval '1 s';
    with gone as (
        update taskd.nodes as n
        set state = 'dead', ended_at = case when n.state = 'dead' then n.ended_at else t end,
            search_from = 0, search_file = file, search_again = false
        where n.id in (
            select m.id from taskd.nodes as m
            where (p_nodes is null and m.state in ('live', 'draining') and m.lease_until < t)
                or (m.id = any(p_nodes) and (m.state <> 'dead' or m.search_from is null))
            for update skip locked)
        returning n.id
    ), uncounted as (
        delete from taskd.running as r using gone where r.node = gone.id
    )
    delete from taskd.node_types as n using gone where n.node = gone.id;

    select array_agg(s.id), min(case when s.search_file = file then s.search_from else 0 end)
    into lost, first
    from (
        select n.id, n.search_from, n.search_file from taskd.nodes as n
        where n.state = 'dead' and n.search_from is not null and (p_nodes is null or n.id = any(p_nodes))
        for update skip locked) as s;
    if lost is null then
        return;
    end if;
    last := least(blocks, first + p_blocks);
    tids := array(
        select q.ctid from taskd.queue as q
        where q.ctid >= format('(%s,0)', first)::tid and q.ctid < format('(%s,0)', last)::tid
            and q.claimed and q.node = any(lost)
        for update);
    begin
        select coalesce(jsonb_object_agg(a.dead, a.jobs), '{}') into taken
        from taskd.take_away(lost, tids, p_cause, p_error) as a;
    exception when others then
        -- One of them is refused: each by itself, then.
        foreach place in array tids loop
            begin
                select taken || coalesce(
                    jsonb_object_agg(a.dead, coalesce((taken->>a.dead::text)::bigint, 0) + a.jobs), '{}')
                into taken
                from taskd.take_away(lost, array[place], p_cause, p_error) as a;
            exception when others then
                bad := bad + 1;
            end;
        end loop;
    end;
    update taskd.nodes as n
    set search_again = not done.so and (n.search_again or bad > 0),
        search_file = file,
        search_from = case
            when not done.so then greatest(last, case when n.search_file = file then n.search_from end)
            when n.search_again or bad > 0 then 0 end
    from (select last >= blocks as so) as done
    where n.id = any(lost);
    return query
        select d.id, coalesce((taken->>d.id::text)::bigint, 0), bad, last < blocks
        from unnest(lost) as d (id);
end
$$;

-- Where a claim has to look again. A lane's floor may have passed rows that another transaction held
-- locked, or inserted and had not committed yet: returns the first unclaimed row of each lane between
-- two places. Lane 0 is the horizon of this look: the time and the transactions that were under way before
-- it. The order counts: what has ended by the horizon is visible to the look that follows, and what is not
-- in the horizon takes its times (taskd.moment) after the horizon's.
create function taskd.floors(
    p_types text[], p_priorities smallint[], p_from_at timestamptz[], p_from_id uuid[],
    p_to_at timestamptz[], p_to_id uuid[]
) returns table (lane integer, at timestamptz, id uuid, running bigint[], t timestamptz)
language plpgsql
set enable_seqscan = off set enable_bitmapscan = off set enable_sort = off
as $$
declare
    v_now constant timestamptz := clock_timestamp();
begin
    return query select 0, null::timestamptz, null::uuid,
        array(select x::text::bigint from pg_snapshot_xip(pg_current_snapshot()) as x), v_now;
    for i in 1..coalesce(cardinality(p_types), 0) loop
        return query
            select i, q.run_at, q.id, null::bigint[], null::timestamptz from taskd.queue as q
            where q.type = p_types[i] and q.priority = p_priorities[i]
                and (q.run_at, q.id) >= (p_from_at[i], p_from_id[i])
                and (q.run_at, q.id) <= (p_to_at[i], p_to_id[i])
                and not q.claimed
            order by q.run_at, q.id
            limit 1;
    end loop;
end
$$;

-- The history of a job as JSON, oldest run first; member names as in GET /jobs/{id}.
create function taskd.history_of(p_job uuid) returns jsonb
language sql stable
as $$
    select coalesce(jsonb_agg(jsonb_build_object(
        'attempt', h.attempt,
        'claim', case when h.claim is not null then h.node || ':' || h.claim end,
        'node', (select n.name from taskd.nodes as n where n.id = h.node),
        'started_at', h.started_at, 'ended_at', h.ended_at, 'cause', h.cause, 'error', h.error,
        'exit_code', h.exit_code, 'signal', h.signal, 'cpu_s', h.cpu_s, 'max_rss', h.max_rss
    ) order by h.ended_at, h.attempt), '[]')
    from taskd.history as h where h.job_id = p_job;
$$;

-- The documented read-only view for people with psql: the members of GET /jobs/{id} by name.
create view taskd.job_view as
select
    j.id,
    j.type,
    j.payload::jsonb as payload,
    coalesce(o.status, case
        when q.claimed then 'processing'
        when q.run_at > clock_timestamp() then 'scheduled'
        else 'pending' end) as status,
    coalesce(o.attempts, q.attempts + q.claimed::integer)::integer as attempts,
    coalesce(o.max_attempts, q.max_attempts)::integer as max_attempts,
    j.created_at,
    coalesce(o.run_at, q.run_at) as scheduled_at,
    coalesce(o.run_at, q.run_at) as run_at,
    case when o.id is null then q.error else o.error end as error_message,
    o.result::jsonb as result,
    null::jsonb as progress,
    j.priority::integer as priority,
    coalesce(o.started_at, q.started_at) as started_at,
    o.finished_at,
    j.unique_key,
    coalesce(j.tags, '{}') as tags,
    j.meta::jsonb as meta,
    taskd.history_of(j.id) as history,
    null::text as waiting_for,
    j.client
from taskd.jobs as j
left join taskd.queue as q on q.id = j.id
left join taskd.outcomes as o on o.id = j.id;
