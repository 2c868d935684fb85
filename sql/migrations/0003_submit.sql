-- Why: `taskd.submit` and `taskd.submit_many`, for applications that submit inside their own transaction; how
--      many jobs of a type wait, which submits over HTTP are admitted by.
-- Lock: none that matters, everything is new.
-- Safe with old code: yes, nothing that exists changes.
--
-- The channel of NOTIFY is the schema's name, written with its dot so that another schema's is put in.
-- Few statements and no SET in what runs for every job: each statement takes a snapshot, which is what a
-- call costs beside its rows when many commit at once.

-- Ids are version 7 UUIDs: they sort by the millisecond they were made in (RFC 9562, section 5.7).
-- The part of an id that tells its time; the rest of it is from the 16th character of a random UUID.
create function taskd.id_head(p_at timestamptz) returns text
language sql stable  -- as extract() is: declared immutable it would be called and not inlined
as $$
    select overlay(lpad(to_hex((extract(epoch from p_at) * 1000)::bigint), 12, '0') placing '-' from 9 for 0)
        || '-7';
$$;

-- Refuses a job as the door does; `p_where` stands before the member's name (`jobs[3].`).
create function taskd.refuse(p_where text, p_member text, p_problem text) returns void
language plpgsql
as $$
begin
    raise exception '%', p_where || p_member || ': ' || p_problem using errcode = '22023';
end
$$;

-- Whether a text has 1 to `p_most` characters and all of them can be printed. The ranges are those that
-- Python's str.isprintable() refuses and people meet: written out, because [[:cntrl:]] goes by the collation.
create function taskd.is_printable(p_text text, p_most integer) returns boolean
language sql immutable
as $$
    select length(p_text) between 1 and p_most
        and p_text !~ ('[\u0001-\u001f\u007f-\u00a0\u00ad\u061c\u1680\u180e\u2000-\u200f\u2028-\u202f'
            '\u205f-\u206f\u3000\ue000-\uf8ff\ufeff\ufff9-\ufffb]');
$$;

-- Checks a payload or `meta` as far as the type's schema is not needed: what a worker could not read is
-- refused here (levels of nesting, digits of a number, members of an object, length).
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
    elsif jsonb_path_exists(p_value, 'strict $.**{64} ? (@.type() == "object" || @.type() == "array")') then
        perform taskd.refuse(p_where, p_member, 'is nested more than 64 levels deep');
    elsif length(written) > 50000 and exists (
        select from jsonb_path_query(p_value, 'strict $.** ? (@.type() == "object")') as o (value)
        where (select count(*) from jsonb_object_keys(o.value)) > 10000
    ) then
        perform taskd.refuse(p_where, p_member, 'has an object of more than 10000 members');
    end if;
end
$$;

-- The rules of POST /jobs for one job. Raises 22023 with the member's name.
create function taskd.check_job(
    p_where text, p_type text, p_payload jsonb, p_priority integer, p_delay double precision,
    p_run_at timestamptz, p_max_attempts integer, p_timeout double precision, p_expires_in double precision,
    p_unique_key text, p_unique_while text, p_tags text[], p_meta jsonb
) returns void
language plpgsql
as $$
declare
    longest double precision;
    n integer;
begin
    if p_type is null or p_type !~ '^[a-z][a-z0-9_.-]{0,63}$' then
        perform taskd.refuse(p_where, 'type', 'must be a job type''s name');
    elsif p_type like 'taskd' || '.%' then
        perform taskd.refuse(p_where, 'type', 'names that begin with taskd' || '. are reserved');
    end if;
    select k.timeout into longest
    from taskd.types as k where k.type = p_type and k.retired_at is null and k.enabled;
    if not found then
        perform taskd.refuse(p_where, 'type', format('is no job type here: %s', p_type));
    end if;
    perform taskd.check_json(p_where, 'payload', p_payload, 1048576);
    if p_priority not between -100 and 100 then
        perform taskd.refuse(p_where, 'priority', 'must be -100 to 100');
    elsif p_delay is not null and p_run_at is not null then
        perform taskd.refuse(p_where, 'run_at', 'can''t stand beside delay');
    elsif p_delay not between 0 and 31536000 then
        perform taskd.refuse(p_where, 'delay', 'must be 0 to 31536000 seconds');
    elsif p_run_at > clock_timestamp() + interval '365 days' or not isfinite(p_run_at) then
        perform taskd.refuse(p_where, 'run_at', 'must be at most 365 days ahead');
    elsif p_max_attempts not between 1 and 100 then
        perform taskd.refuse(p_where, 'max_attempts', 'must be 1 to 100');
    elsif p_timeout is not null and not (p_timeout > 0 and p_timeout <= longest) then
        perform taskd.refuse(p_where, 'timeout', format('must be above 0 and at most %s seconds', longest));
    elsif p_expires_in is not null and not (p_expires_in > 0 and p_expires_in <= 31536000) then
        perform taskd.refuse(p_where, 'expires_in', 'must be above 0 and at most 31536000 seconds');
    elsif not taskd.is_printable(p_unique_key, 255) then
        perform taskd.refuse(p_where, 'unique_key', 'must be 1 to 255 printable characters');
    elsif p_unique_while is null or p_unique_while not in ('retained', 'unfinished') then
        perform taskd.refuse(p_where, 'unique_while', 'must be retained or unfinished');
    elsif cardinality(p_tags) > 10 then
        perform taskd.refuse(p_where, 'tags', 'must be at most 10');
    end if;
    select u.n - 1 into n from unnest(p_tags) with ordinality as u (tag, n)
    where u.tag is null or not taskd.is_printable(u.tag, 64) order by u.n limit 1;
    if found then
        perform taskd.refuse(p_where, format('tags[%s]', n), 'must be 1 to 64 printable characters');
    end if;
    if p_meta is not null then
        perform taskd.check_json(p_where, 'meta', p_meta, 4096);
    end if;
end
$$;

-- Makes `p_job` the holder of a unique key of `p_client`, or returns the job that holds it already: null is
-- "yours". Raises 23505 when that one was submitted with another body.
create function taskd.hold_key(
    p_where text, p_client uuid, p_key text, p_job uuid, p_hash bytea
) returns uuid
language plpgsql
set enable_seqscan = off
as $$
declare
    holder record;
begin
    -- Again when the holder's row went away while we waited for it; a second time is rare, a tenth never.
    for i in 1..10 loop
        insert into taskd.unique_keys as k (client, key, job_id, body_hash)
        values (p_client, p_key, p_job, p_hash)
        on conflict do nothing;
        if found then
            return null;
        end if;
        -- A new statement, hence a new snapshot: the holder that made us wait is visible now.
        select k.job_id, k.body_hash into holder from taskd.unique_keys as k
        where k.client = p_client and k.key = p_key;
        if holder.body_hash = p_hash then
            return holder.job_id;
        elsif found then
            raise exception '%unique_key: is held by job % with another body', p_where, holder.job_id
                using errcode = '23505';
        end if;
    end loop;
    raise exception '%unique_key: its holders end faster than they can be seen; submit again', p_where
        using errcode = '40001';
end
$$;

-- Stores one job and returns its id; that of another one when it holds the unique key for the same body.
-- `p_job` is the id to be, null makes one.
create function taskd.store_job(
    p_where text, p_job uuid, p_type text, p_payload jsonb, p_priority integer, p_delay double precision,
    p_run_at timestamptz, p_max_attempts integer, p_timeout double precision, p_expires_in double precision,
    p_unique_key text, p_unique_while text, p_tags text[], p_meta jsonb, p_client uuid, p_wake boolean
) returns uuid
language plpgsql
as $$
declare
    t timestamptz;
    job uuid;
    prio integer;
    attempts integer;
    doc json;
    lane boolean;
    holder uuid;
    hash bytea;
begin
    -- The transaction gets its number before the clock is read, as in taskd.moment. Not now(): the
    -- transaction may be long under way, and floors have passed its beginning.
    select c.t, coalesce(p_job, (taskd.id_head(c.t) || substr(gen_random_uuid()::text, 16))::uuid),
        to_json(p_payload), c.priority, c.max_attempts,
        exists (select from taskd.lanes as l where l.type = p_type and l.priority = c.priority)
    into t, job, doc, prio, attempts, lane
    from (
        select case when pg_current_xact_id() is not null then clock_timestamp() end as t,
            coalesce(p_priority, k.priority) as priority,
            coalesce(p_max_attempts, k.max_attempts) as max_attempts
        from taskd.types as k where k.type = p_type and k.retired_at is null and k.enabled
        offset 0  -- read once
    ) as c;
    perform taskd.check_job(p_where, p_type, p_payload, p_priority, p_delay, p_run_at, p_max_attempts,
        p_timeout, p_expires_in, p_unique_key, p_unique_while, p_tags, p_meta);
    if p_unique_key is not null then
        -- jsonb_hash_extended and not a digest of the text: 1 and 1.0 are one JSON value.
        hash := decode(
            (select string_agg(lpad(to_hex(jsonb_hash_extended(b.body, s.seed)), 16, '0'), '' order by s.seed)
            from (select jsonb_build_array(p_type, p_payload, p_priority, p_delay,
                extract(epoch from p_run_at), p_max_attempts, p_timeout, p_expires_in, p_unique_while,
                coalesce(p_tags, '{}'), p_meta) as body) as b, generate_series(1, 4) as s (seed)), 'hex');
        holder := taskd.hold_key(p_where, p_client, p_unique_key, job, hash);
        if holder is not null then
            return holder;
        end if;
    end if;
    with asked as (
        insert into taskd.jobs (id, client, created_at, priority, max_attempts, timeout_ms, type, payload,
                                unique_key, key_hash, tags, meta)
        values (job, p_client, t, prio, attempts, ceil(p_timeout * 1000), p_type, doc, p_unique_key,
            case when p_unique_while = 'unfinished' then hash end, nullif(p_tags, '{}'), to_json(p_meta))
    )
    insert into taskd.queue (id, run_at, expires_at, priority, max_attempts, keyed, type)
    values (job, greatest(t, p_run_at, t + p_delay * interval '1 s'), t + p_expires_in * interval '1 s',
        prio, attempts, p_unique_key is not null and p_unique_while = 'unfinished', p_type);
    if not lane then
        insert into taskd.lanes (type, priority) values (p_type, prio);
    end if;
    if p_wake then
        perform pg_notify(rtrim('taskd.', '.'), p_type || ' ' || prio);
    end if;
    return job;
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
    t timestamptz;
    job uuid;
    prio integer;
    attempts integer;
    doc json;
    lane boolean;
begin
    -- What most jobs are, without a call: a known type, a short sound payload, at most a priority. It is half
    -- of what a call of store_job costs, which does the same for all others and has the words to refuse.
    if delay is null and run_at is null and timeout is null and expires_in is null and unique_key is null
        and max_attempts is null and meta is null and tags = '{}' and unique_while = 'retained'
        and jsonb_typeof(payload) = 'object' and submit.type not like 'taskd' || '.%'
        and not jsonb_path_exists(payload, 'strict $.**{64} ? (@.type() == "object" || @.type() == "array")')
    then
        select c.t, (taskd.id_head(c.t) || substr(gen_random_uuid()::text, 16))::uuid, to_json(payload),
            c.priority, c.max_attempts,
            exists (select from taskd.lanes as l where l.type = submit.type and l.priority = c.priority)
        into t, job, doc, prio, attempts, lane
        from (
            select case when pg_current_xact_id() is not null then clock_timestamp() end as t,
                coalesce(submit.priority, k.priority) as priority, k.max_attempts
            from taskd.types as k where k.type = submit.type and k.retired_at is null and k.enabled
            offset 0
        ) as c;
        if prio between -100 and 100 and octet_length(doc::text) <= 300 then
            with asked as (
                insert into taskd.jobs (id, client, created_at, priority, max_attempts, type, payload)
                values (job, client, t, prio, attempts, submit.type, doc)
            )
            insert into taskd.queue (id, run_at, priority, max_attempts, type)
            values (job, t, prio, attempts, submit.type);
            if not lane then
                insert into taskd.lanes (type, priority) values (submit.type, prio);
            end if;
            if wake then
                perform pg_notify(rtrim('taskd.', '.'), submit.type || ' ' || prio);
            end if;
            return job;
        end if;
    end if;
    return taskd.store_job('', null, type, payload, priority, delay, run_at, max_attempts, timeout,
        expires_in, unique_key, unique_while, tags, meta, client, wake);
end
$$;

-- The number that is a member of a job in `submit_many`; null when it is not there.
create function taskd.read_number(p_where text, p_entry jsonb, p_member text, p_whole boolean)
returns double precision
language plpgsql
as $$
declare
    value constant jsonb := p_entry->p_member;
begin
    if value is null then
        return null;
    elsif jsonb_typeof(value) <> 'number' or (p_whole and strpos(value::text, '.') > 0) then
        perform taskd.refuse(p_where, p_member, case when p_whole then 'must be a whole number'
            else 'must be a number' end);
    elsif value not between '-1000000000' and '1000000000' then
        perform taskd.refuse(p_where, p_member, 'is out of range');
    end if;
    return value::double precision;
end
$$;

-- The text that is a member of a job in `submit_many`; null when it is not there.
create function taskd.read_text(p_where text, p_entry jsonb, p_member text) returns text
language plpgsql
as $$
begin
    if jsonb_typeof(p_entry->p_member) <> 'string' then
        perform taskd.refuse(p_where, p_member, 'must be a text');
    end if;
    return p_entry->>p_member;
end
$$;

-- The moment that is a member of a job in `submit_many`; null when it is not there.
create function taskd.read_moment(p_where text, p_entry jsonb, p_member text) returns timestamptz
language plpgsql
as $$
declare
    written constant text := taskd.read_text(p_where, p_entry, p_member);
begin
    if written !~ ('^[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt]([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9]([.][0-9]{1,18})?'
        '([Zz]|[+-]([01][0-9]|2[0-3]):[0-5][0-9])$')
    then
        perform taskd.refuse(p_where, p_member, 'must be an RFC 3339 time with an offset');
    end if;
    return written::timestamptz;
exception when datetime_field_overflow or invalid_datetime_format then
    perform taskd.refuse(p_where, p_member, 'is a moment that does not exist');
end
$$;

-- One job of `submit_many` that is not of the plainest form: checked, and stored unless `p_job` is null.
create function taskd.store_entry(p_where text, p_job uuid, p_entry jsonb, p_client uuid, p_wake boolean)
returns uuid
language plpgsql
as $$
declare
    members constant text[] := '{type,payload,priority,delay,run_at,scheduled_at,max_attempts,timeout,'
        'expires_in,unique_key,unique_while,tags,meta}';
    type text;
    priority integer;
    delay double precision;
    run_at timestamptz;
    max_attempts integer;
    timeout double precision;
    expires_in double precision;
    unique_key text;
    unique_while text;
    tags text[] := '{}';
    bad text;
begin
    if jsonb_typeof(p_entry) <> 'object' then
        perform taskd.refuse('', rtrim(p_where, '.'), 'must be an object');
    end if;
    select m.name into bad from unnest('{type,payload}'::text[]) with ordinality as m (name, n)
    where not p_entry ? m.name order by m.n limit 1;
    if found then
        perform taskd.refuse(p_where, bad, 'is required');
    end if;
    select m.name into bad from jsonb_object_keys(p_entry) as m (name) where m.name <> all(members) limit 1;
    if found then
        perform taskd.refuse(p_where, left(bad, 64), 'is no member of a job');
    end if;
    type := taskd.read_text(p_where, p_entry, 'type');
    priority := taskd.read_number(p_where, p_entry, 'priority', true);
    delay := taskd.read_number(p_where, p_entry, 'delay', false);
    run_at := taskd.read_moment(p_where, p_entry, 'run_at');
    if p_entry ? 'scheduled_at' then
        if p_entry ? 'run_at' then
            perform taskd.refuse(p_where, 'scheduled_at', 'can''t stand beside run_at');
        end if;
        run_at := taskd.read_moment(p_where, p_entry, 'scheduled_at');
    end if;
    max_attempts := taskd.read_number(p_where, p_entry, 'max_attempts', true);
    timeout := taskd.read_number(p_where, p_entry, 'timeout', false);
    expires_in := taskd.read_number(p_where, p_entry, 'expires_in', false);
    unique_key := taskd.read_text(p_where, p_entry, 'unique_key');
    unique_while := coalesce(taskd.read_text(p_where, p_entry, 'unique_while'), 'retained');
    if p_entry ? 'tags' then
        if jsonb_typeof(p_entry->'tags') <> 'array'
            or jsonb_path_exists(p_entry, 'strict $.tags[*] ? (@.type() != "string")') then
            perform taskd.refuse(p_where, 'tags', 'must be an array of texts');
        end if;
        tags := array(
            select t.tag from jsonb_array_elements_text(p_entry->'tags') with ordinality as t (tag, n)
            order by t.n);
    end if;
    if p_entry ? 'meta' and jsonb_typeof(p_entry->'meta') <> 'object' then
        perform taskd.refuse(p_where, 'meta', 'must be an object');
    end if;
    if p_job is null then
        perform taskd.check_job(p_where, type, p_entry->'payload', priority, delay, run_at, max_attempts,
            timeout, expires_in, unique_key, unique_while, tags, p_entry->'meta');
        return null;
    end if;
    return taskd.store_job(p_where, p_job, type, p_entry->'payload', priority, delay, run_at, max_attempts,
        timeout, expires_in, unique_key, unique_while, tags, p_entry->'meta', p_client, p_wake);
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
    -- One random number for all, counted up: ids in the order of the array, which the jobs then run in.
    seed constant text := gen_random_uuid()::text;
    base constant bigint := ('x' || right(seed, 12))::bit(48)::bigint & 140737488355327;
    amount integer;
    head text;
    t timestamptz;
    plain integer[];
    odd integer[];
    lanes text[];
    stored uuid[] := '{}';
    n integer;
begin
    if jsonb_typeof(jobs) is distinct from 'array' then
        perform taskd.refuse('', 'jobs', 'must be an array');
    end if;
    amount := jsonb_array_length(jobs);
    if amount not between 1 and 10000 then
        perform taskd.refuse('', 'jobs', 'must hold 1 to 10000 jobs');
    end if;
    t := taskd.moment();
    head := taskd.id_head(t) || substr(seed, 16, 9);

    -- The plain ones in one statement: a known type, a sound payload, at most a priority beside them.
    with v as materialized (
        select e.n::integer as n, (head || lpad(to_hex(base + e.n), 12, '0'))::uuid as id, k.type,
            to_json(e.payload) as payload, coalesce(e.priority::text::smallint, k.priority) as priority,
            k.max_attempts
        from (
            select j.n, j.job, j.job->>'type' as type, j.job->'payload' as payload,
                case when j.job ? 'priority' then j.job->'priority' end as priority
            from jsonb_array_elements(jobs) with ordinality as j (job, n)
            offset 0
        ) as e
        join taskd.types as k on k.type = e.type and k.retired_at is null and k.enabled
            and k.type not like 'taskd' || '.%'
        where jsonb_typeof(e.payload) = 'object'
            and e.job - '{type,payload,priority}'::text[] = '{}'
            -- In the order of jsonb nothing but a number lies between two numbers.
            and (e.priority is null
                or e.priority between '-100' and '100' and strpos(e.priority::text, '.') = 0)
            and octet_length(e.payload::text) <= 300
            and not jsonb_path_exists(e.payload,
                'strict $.**{64} ? (@.type() == "object" || @.type() == "array")')
    ), asked as (
        insert into taskd.jobs (id, client, created_at, priority, max_attempts, type, payload)
        select v.id, client, t, v.priority, v.max_attempts, v.type, v.payload from v
    ), waiting as (
        insert into taskd.queue (id, run_at, priority, max_attempts, type)
        select v.id, t, v.priority, v.max_attempts, v.type from v
    ), seen as materialized (
        select distinct v.type, v.priority from v
    ), made as (
        insert into taskd.lanes as l (type, priority)
        select s.type, s.priority from seen as s
        where not exists (select from taskd.lanes as o where o.type = s.type and o.priority = s.priority)
    )
    select (select array_agg(v.n) from v), (select array_agg(s.type || ' ' || s.priority) from seen as s)
    into plain, lanes;
    if wake then
        perform pg_notify(rtrim('taskd.', '.'), l.lane) from unnest(lanes) as l (lane);
    end if;

    -- All others one by one: first whether each can be stored, so that the first bad one is named. Then by
    -- key, so that two calls with the same keys can't block each other crosswise.
    if cardinality(plain) = amount then
        return query
            select (head || lpad(to_hex(base + g), 12, '0'))::uuid, false
            from generate_series(1, amount) as g;
    else
        odd := array(select g from generate_series(1, amount) as g except select unnest(plain) order by 1);
        foreach n in array odd loop
            perform taskd.store_entry(format('jobs[%s].', n - 1), null, jobs->(n - 1), client, false);
        end loop;
        for n in
            select o.n from unnest(odd) as o (n) order by jobs->(o.n - 1)->>'unique_key' nulls first, o.n
        loop
            stored[n] := taskd.store_entry(format('jobs[%s].', n - 1),
                (head || lpad(to_hex(base + n), 12, '0'))::uuid, jobs->(n - 1), client, wake);
        end loop;
        return query
            select coalesce(stored[m.n], m.id), coalesce(stored[m.n] <> m.id, false)
            from (
                select g as n, (head || lpad(to_hex(base + g), 12, '0'))::uuid as id
                from generate_series(1, amount) as g
            ) as m
            order by m.n;
    end if;
end
$$;

-- How many jobs of a type wait, at most p_enough. A function for its settings alone: where a type is a good
-- part of the queue the planner would read all of the queue from end to end, and the first submits wait.
create function taskd.waiting_of(p_type text, p_enough bigint) returns bigint
language plpgsql stable
set enable_seqscan = off set enable_bitmapscan = off
as $$
begin
    return (
        select count(*) from (
            select from taskd.queue as q where q.type = p_type and not q.claimed limit p_enough
        ) as waiting);
end
$$;
