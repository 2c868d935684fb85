-- Why: `taskd.submit` and `taskd.submit_many`, for applications that submit inside their own transaction.
-- Lock: none that matters, everything is new.
-- Safe with old code: yes, nothing that exists changes.
--
-- The channel of NOTIFY is the schema's name, written with its dot so that another schema's is put in.

-- Ids are version 7 UUIDs: they sort by the millisecond they were made in (RFC 9562, section 5.7).
-- The part of an id that tells its time; the rest of it is from the 16th character of a random UUID.
create function taskd.id_head() returns text
language sql volatile
as $$
    select overlay(lpad(to_hex((extract(epoch from clock_timestamp()) * 1000)::bigint), 12, '0')
        placing '-' from 9 for 0) || '-7';
$$;

create function taskd.new_id() returns uuid
language sql volatile
as $$
    select (taskd.id_head() || substr(gen_random_uuid()::text, 16))::uuid;
$$;

-- Refuses a job as the door does; `p_where` stands before the member's name (`jobs[3].`).
create function taskd.refuse(p_where text, p_member text, p_problem text) returns void
language plpgsql
as $$
begin
    raise exception '%', p_where || p_member || ': ' || p_problem using errcode = '22023';
end
$$;

-- Checks a payload or `meta` as far as the type's schema is not needed: what a worker could not read is
-- refused here (levels of nesting, digits of a number, length).
create function taskd.check_json(p_where text, p_member text, p_value jsonb, p_most integer) returns void
language plpgsql
as $$
declare
    written constant text := p_value::text;
begin
    if jsonb_typeof(p_value) is distinct from 'object' then
        perform taskd.refuse(p_where, p_member, 'must be an object');
    elsif octet_length(written) > p_most then
        perform taskd.refuse(p_where, p_member, format('must be at most %s bytes', p_most));
    elsif length(written) > 300 and written ~ '[0-9]{150}[0-9]{151}' then
        perform taskd.refuse(p_where, p_member, 'has a number of more than 300 digits');
    elsif length(written) > 128
        and jsonb_path_exists(p_value, '$.**{64} ? (@.type() == "object" || @.type() == "array")') then
        perform taskd.refuse(p_where, p_member, 'is nested more than 64 levels deep');
    end if;
end
$$;

-- The rules of POST /jobs for one job; returns the published type. Raises 22023 with the member's name.
create function taskd.check_job(
    p_where text, p_type text, p_payload jsonb, p_priority integer, p_delay double precision,
    p_run_at timestamptz, p_max_attempts integer, p_timeout double precision, p_expires_in double precision,
    p_unique_key text, p_unique_while text, p_tags text[], p_meta jsonb
) returns json
language plpgsql stable
as $$
declare
    known json;
    longest double precision;
begin
    if p_type is null or p_type !~ '^[a-z][a-z0-9_.-]{0,63}$' or p_type like ('taskd' || '.%') then
        perform taskd.refuse(p_where, 'type', 'must be a job type''s name');
    end if;
    select t.info into known from taskd.types as t where t.type = p_type and t.retired_at is null;
    if known is null then
        perform taskd.refuse(p_where, 'type', format('is not a known job type: %s', p_type));
    end if;
    perform taskd.check_json(p_where, 'payload', p_payload, 1048576);
    if p_priority not between -100 and 100 then
        perform taskd.refuse(p_where, 'priority', 'must be -100 to 100');
    elsif p_delay is not null and p_run_at is not null then
        perform taskd.refuse(p_where, 'run_at', 'can''t stand beside delay');
    elsif p_delay is not null and not (p_delay between 0 and 31536000) then
        perform taskd.refuse(p_where, 'delay', 'must be 0 to 31536000 seconds');
    elsif p_run_at > clock_timestamp() + interval '365 days' or not isfinite(p_run_at) then
        perform taskd.refuse(p_where, 'run_at', 'must be at most 365 days ahead');
    elsif p_max_attempts not between 1 and 100 then
        perform taskd.refuse(p_where, 'max_attempts', 'must be 1 to 100');
    elsif p_expires_in is not null and not (p_expires_in > 0 and p_expires_in <= 31536000) then
        perform taskd.refuse(p_where, 'expires_in', 'must be above 0 and at most 31536000 seconds');
    elsif p_unique_key is not null
        and (length(p_unique_key) not between 1 and 255 or p_unique_key ~ '[[:cntrl:]]') then
        perform taskd.refuse(p_where, 'unique_key', 'must be 1 to 255 printable characters');
    elsif p_unique_while is null or p_unique_while not in ('retained', 'unfinished') then
        perform taskd.refuse(p_where, 'unique_while', 'must be retained or unfinished');
    elsif cardinality(p_tags) > 10 then
        perform taskd.refuse(p_where, 'tags', 'must be at most 10');
    elsif exists (
        select from unnest(p_tags) as tag
        where tag is null or length(tag) not between 1 and 64 or tag ~ '[[:cntrl:]]'
    ) then
        perform taskd.refuse(p_where, 'tags', 'must be 1 to 64 printable characters each');
    end if;
    if p_timeout is not null then
        longest := coalesce((known->>'timeout')::double precision, 300);
        if not (p_timeout > 0 and p_timeout <= longest) then
            perform taskd.refuse(p_where, 'timeout', format('must be above 0 and at most %s seconds', longest));
        end if;
    end if;
    if p_meta is not null then
        perform taskd.check_json(p_where, 'meta', p_meta, 4096);
    end if;
    return known;
end
$$;

-- Stores one checked job, or finds the one that holds its unique key; raises 23505 when that is another.
create function taskd.store_job(
    p_where text, p_type text, p_payload jsonb, p_priority integer, p_delay double precision,
    p_run_at timestamptz, p_max_attempts integer, p_timeout double precision, p_expires_in double precision,
    p_unique_key text, p_unique_while text, p_tags text[], p_meta jsonb, p_client uuid
) returns table (job_id uuid, duplicate boolean, priority integer)
language plpgsql
set enable_hashjoin = off set enable_mergejoin = off set enable_seqscan = off
as $$
declare
    job constant uuid := taskd.new_id();
    info constant json := taskd.check_job(p_where, p_type, p_payload, p_priority, p_delay, p_run_at,
        p_max_attempts, p_timeout, p_expires_in, p_unique_key, p_unique_while, p_tags, p_meta);
    prio constant smallint := coalesce(p_priority, (info->>'priority')::integer, 0);
    attempts constant smallint := coalesce(p_max_attempts, (info->'retry'->>'max_attempts')::integer, 3);
    t timestamptz;
    holder record;
    hash bytea;
begin
    if p_unique_key is not null then
        hash := sha256(convert_to(jsonb_build_array(p_type, p_payload, p_priority, p_delay, p_run_at,
            p_max_attempts, p_timeout, p_expires_in, p_unique_while, p_tags, p_meta)::text, 'UTF8'));
        insert into taskd.unique_keys as k (client, key, job_id, body_hash)
        values (p_client, p_unique_key, job, hash)
        on conflict do nothing;
        if not found then
            -- A new statement, hence a new snapshot: the holder that made us wait is visible now.
            select k.job_id, k.body_hash into holder from taskd.unique_keys as k
            where k.client = p_client and k.key = p_unique_key;
            if holder.body_hash = hash then
                return query select holder.job_id, true, prio::integer;
                return;
            elsif holder.job_id is null then
                raise exception '%unique_key: its holder has just ended; submit again', p_where
                    using errcode = '40001';
            end if;
            raise exception '%unique_key: is held by job % with another body', p_where, holder.job_id
                using errcode = '23505';
        end if;
    end if;
    -- Read now and not at the start of the caller's transaction, which a floor may have passed long ago.
    t := taskd.moment();
    insert into taskd.jobs (id, client, created_at, priority, max_attempts, type, payload, unique_key, tags,
                            meta)
    values (job, p_client, t, prio, attempts, p_type, p_payload::text::json, p_unique_key,
        nullif(p_tags, '{}'), p_meta::text::json);
    insert into taskd.queue (id, run_at, expires_at, timeout_ms, priority, max_attempts, keyed, type)
    values (job, greatest(t, coalesce(p_run_at, t + p_delay * interval '1 s')),
        t + p_expires_in * interval '1 s', round(p_timeout * 1000)::integer, prio, attempts,
        p_unique_key is not null and p_unique_while = 'unfinished', p_type);
    if not exists (select from taskd.lanes as l where l.type = p_type and l.priority = prio) then
        insert into taskd.lanes (type, priority) values (p_type, prio) on conflict do nothing;
    end if;
    return query select job, false, prio::integer;
end
$$;

-- Submits one job in the caller's own transaction and returns its id; with a unique key that is held by
-- the same job, that job's id. Checks as POST /jobs does, the payload's schema excepted: that is checked
-- when the job is claimed. Without `wake` the job starts at the next poll, within a second; with it the
-- caller's commit notifies, which takes a lock that all notifying commits of the server share.
create function taskd.submit(
    type text,
    payload jsonb,
    priority integer default null,
    delay double precision default null,
    run_at timestamptz default null,
    max_attempts integer default null,
    timeout double precision default null,
    expires_in double precision default null,
    unique_key text default null,
    unique_while text default 'retained',
    tags text[] default '{}',
    meta jsonb default null,
    client uuid default '00000000-0000-7000-8000-000000000002',
    wake boolean default false
) returns uuid
language plpgsql
as $$
declare
    stored record;
begin
    select s.job_id, s.priority into stored
    from taskd.store_job('', submit.type, submit.payload, submit.priority, submit.delay, submit.run_at,
        submit.max_attempts, submit.timeout, submit.expires_in, submit.unique_key, submit.unique_while,
        submit.tags, submit.meta, submit.client) as s;
    if submit.wake then
        perform pg_notify(rtrim('taskd.', '.'), submit.type || ' ' || stored.priority);
    end if;
    return stored.job_id;
end
$$;

-- Submits many jobs at once, all or nothing: `jobs` is an array of 1 to 10 000 objects with the members of
-- POST /jobs. Returns their ids in order. A bad job raises 22023 and is named: `jobs[3].payload: ...`.
create function taskd.submit_many(
    jobs jsonb,
    client uuid default '00000000-0000-7000-8000-000000000002',
    wake boolean default false
) returns table (job_id uuid, duplicate boolean)
language plpgsql
as $$
#variable_conflict use_column
declare
    members constant text[] := '{type,payload,priority,delay,run_at,scheduled_at,max_attempts,timeout,'
        'expires_in,unique_key,unique_while,tags,meta}';
    amount integer;
    bad record;
    t timestamptz;
    head text;
    made uuid[];
    lane record;
begin
    if jsonb_typeof(jobs) is distinct from 'array' then
        perform taskd.refuse('', 'jobs', 'must be an array');
    end if;
    amount := jsonb_array_length(jobs);
    if amount not between 1 and 10000 then
        perform taskd.refuse('', 'jobs', 'must hold 1 to 10000 jobs');
    end if;
    select e.n - 1 as n, k.name into bad
    from jsonb_array_elements(jobs) with ordinality as e (job, n)
    left join lateral (
        select m.name from jsonb_object_keys(case when jsonb_typeof(e.job) = 'object' then e.job else '{}' end)
            as m (name)
        where m.name <> all(members) limit 1
    ) as k on true
    where jsonb_typeof(e.job) <> 'object' or k.name is not null
    order by e.n limit 1;
    if bad.name is not null then
        perform taskd.refuse(format('jobs[%s].', bad.n), bad.name, 'is no member of a job');
    elsif bad.n is not null then
        perform taskd.refuse('', format('jobs[%s]', bad.n), 'must be an object');
    end if;

    -- The few that need more than a look at their own members are taken one by one.
    if jobs @? '$[*] ? (exists (@.unique_key) || exists (@.run_at) || exists (@.scheduled_at))' then
        for lane in
            select v.*, v.n - 1 as place
            from rows from (jsonb_to_recordset(jobs) as (
                type text, payload jsonb, priority integer, delay double precision, run_at timestamptz,
                scheduled_at timestamptz, max_attempts integer, timeout double precision,
                expires_in double precision, unique_key text, unique_while text, tags text[], meta jsonb))
                with ordinality as v (type, payload, priority, delay, run_at, scheduled_at, max_attempts,
                    timeout, expires_in, unique_key, unique_while, tags, meta, n)
            -- By key, so that two calls with the same keys can't block each other crosswise.
            order by v.unique_key, v.n
        loop
            select s.job_id, s.duplicate into bad
            from taskd.store_job(format('jobs[%s].', lane.place), lane.type, lane.payload, lane.priority,
                lane.delay, coalesce(lane.run_at, lane.scheduled_at), lane.max_attempts, lane.timeout,
                lane.expires_in, lane.unique_key, coalesce(lane.unique_while, 'retained'),
                coalesce(lane.tags, '{}'), lane.meta, client) as s;
            made[lane.n] := bad.job_id;
            if bad.duplicate then
                jobs := jsonb_set(jobs, array[lane.place::text], 'true');
            end if;
        end loop;
        if wake then
            perform pg_notify(rtrim('taskd.', '.'), '');
        end if;
        return query
            select m.id, jobs->(m.n - 1)::integer = 'true' from unnest(made) with ordinality as m (id, n)
            order by m.n;
        return;
    end if;

    t := taskd.moment();
    head := taskd.id_head();
    made := array(
        select (head || substr(gen_random_uuid()::text, 16))::uuid from generate_series(1, amount));
    -- One look at all; what does not pass is looked at again by the one function that has the words.
    select v.*, v.n - 1 as place into bad
    from rows from (jsonb_to_recordset(jobs) as (
        type text, payload jsonb, priority integer, delay double precision, max_attempts integer,
        timeout double precision, expires_in double precision, unique_while text, tags text[], meta jsonb))
        with ordinality as v (type, payload, priority, delay, max_attempts, timeout, expires_in, unique_while,
            tags, meta, n)
    left join taskd.types as k on k.type = v.type and k.retired_at is null
    where k.type is null or v.type like ('taskd' || '.%') or jsonb_typeof(v.payload) is distinct from 'object'
        or octet_length(v.payload::text) > 128
        or v.priority not between -100 and 100
        or v.delay is not null or v.max_attempts not between 1 and 100 or v.timeout is not null
        or v.expires_in is not null or v.unique_while is not null or v.tags is not null or v.meta is not null
    order by v.n limit 1;
    if bad.place is not null then
        for bad in
            select v.*, v.n - 1 as place
            from rows from (jsonb_to_recordset(jobs) as (
                type text, payload jsonb, priority integer, delay double precision, max_attempts integer,
                timeout double precision, expires_in double precision, unique_while text, tags text[],
                meta jsonb))
                with ordinality as v (type, payload, priority, delay, max_attempts, timeout, expires_in,
                    unique_while, tags, meta, n)
            order by v.n
        loop
            perform taskd.check_job(format('jobs[%s].', bad.place), bad.type, bad.payload, bad.priority,
                bad.delay, null, bad.max_attempts, bad.timeout, bad.expires_in, null,
                coalesce(bad.unique_while, 'retained'), coalesce(bad.tags, '{}'), bad.meta);
        end loop;
    end if;
    with v as materialized (
        select made[w.n] as id, w.*,
            coalesce(w.priority, (k.info->>'priority')::integer, 0)::smallint as prio,
            coalesce(w.max_attempts, (k.info->'retry'->>'max_attempts')::integer, 3)::smallint as attempts
        from rows from (jsonb_to_recordset(jobs) as (
            type text, payload json, priority integer, delay double precision, max_attempts integer,
            timeout double precision, expires_in double precision, tags text[], meta json))
            with ordinality as w (type, payload, priority, delay, max_attempts, timeout, expires_in, tags, meta,
                n)
        join taskd.types as k on k.type = w.type
    ), asked as (
        insert into taskd.jobs (id, client, created_at, priority, max_attempts, type, payload, tags, meta)
        select v.id, client, t, v.prio, v.attempts, v.type, v.payload, nullif(v.tags, '{}'), v.meta from v
    ), waiting as (
        insert into taskd.queue (id, run_at, expires_at, timeout_ms, priority, max_attempts, type)
        select v.id, greatest(t, coalesce(t + v.delay * interval '1 s', t)), t + v.expires_in * interval '1 s',
            round(v.timeout * 1000)::integer, v.prio, v.attempts, v.type
        from v
    )
    insert into taskd.lanes as l (type, priority)
    select distinct v.type, v.prio from v
    where not exists (select from taskd.lanes as o where o.type = v.type and o.priority = v.prio)
    on conflict do nothing;
    if wake then
        perform pg_notify(rtrim('taskd.', '.'), '');
    end if;
    return query select m.id, false from unnest(made) with ordinality as m (id, n) order by m.n;
end
$$;
