-- The roles of taskd, and what each may do to its schema. Manual: docs/operate/roles.md.
--
-- Run it after every migration: rights of what is new are given here and nowhere else. Again is always
-- safe; rights are set anew in one transaction, settings that somebody changed stay. To make the roles it
-- takes a superuser or a role with CREATEROLE that owns schema and database; later any member of
-- taskd_owner. With psql: `psql --single-transaction --set ON_ERROR_STOP=1 --file roles.sql`.
-- Names of roles are the server's: all schemas of one server share these five.

-- Roles. No role here inherits from another; a login is given by hand.
do $$
declare
    r record;
    s text;
    me constant text := current_user;
begin
    -- Only on the logins themselves: a role that is a member of one of these keeps its own settings.
    for r in
        select v.name, v.connections, v.settings, p.oid, coalesce(p.rolconfig, '{}') as config,
            coalesce(p.rolconnlimit, -1) as limit_now,
            p.rolsuper or p.rolcreaterole or p.rolcreatedb or p.rolreplication or p.rolbypassrls as mighty
        from (values
            -- A migration may build an index for as long as that takes, and waits for the one before it.
            ('taskd_owner', 5, '{statement_timeout=1h,lock_timeout=10s,'
                'idle_in_transaction_session_timeout=1min}'),
            -- Each process has up to database.pool_max connections, 5 in use.
            ('taskd_api', 40, '{statement_timeout=5s,lock_timeout=2s,'
                'idle_in_transaction_session_timeout=10s}'),
            -- Each node has 3.
            ('taskd_worker', 60, '{statement_timeout=5s,lock_timeout=2s,'
                'idle_in_transaction_session_timeout=10s}'),
            ('taskd_submit', 20, '{statement_timeout=10s,lock_timeout=5s,'
                'idle_in_transaction_session_timeout=1min}'),
            -- People. A transaction that they leave open keeps dead rows of the queue from being removed.
            ('taskd_ro', 10, '{statement_timeout=1min,lock_timeout=2s,'
                'idle_in_transaction_session_timeout=1min,default_transaction_read_only=on}')
        ) as v (name, connections, settings)
        left join pg_roles as p on p.rolname = v.name
    loop
        if r.oid is null then
            execute format('create role %I nologin', r.name);
        elsif r.mighty then
            raise exception 'role % can do what no role of taskd may; say ALTER ROLE % NOSUPERUSER '
                'NOCREATEROLE NOCREATEDB NOREPLICATION NOBYPASSRLS', r.name, r.name using errcode = '42501';
        end if;
        if r.limit_now = -1 then
            execute format('alter role %I connection limit %s', r.name, r.connections);
        end if;
        foreach s in array r.settings::text[] loop
            if not exists (
                select from unnest(r.config) as c (entry)
                where split_part(c.entry, '=', 1) = split_part(s, '=', 1)
            ) then
                execute format('alter role %I set %s = %L',
                    r.name, split_part(s, '=', 1), split_part(s, '=', 2));
            end if;
        end loop;
        -- These two are no matter of taste: JIT makes claims slow, and names are found where they should be.
        if not 'jit=off' = any(r.config) then
            execute format('alter role %I set jit = off', r.name);
        end if;
        if not 'search_path=pg_catalog, pg_temp' = any(r.config) then
            execute format('alter role %I set search_path = pg_catalog, pg_temp', r.name);
        end if;
    end loop;
    if not pg_has_role(me, 'taskd_owner', 'usage') then
        execute format('grant taskd_owner to %I', me);  -- what it owns is handed over below
    end if;
end
$$;

-- The schema and all that is in it belong to taskd_owner. Takes locks on what changes hands, else none.
set local lock_timeout = '2s';
do $$
declare
    home constant oid := (select c.relnamespace from pg_class as c where c.oid = 'taskd.jobs'::regclass);
    owner constant oid := 'taskd_owner'::regrole;
    o record;
begin
    if (select n.nspowner from pg_namespace as n where n.oid = home) <> owner then
        execute format('alter schema %s owner to taskd_owner', home::regnamespace);
    end if;
    for o in
        select case c.relkind when 'v' then 'view' when 'm' then 'materialized view' when 'S' then 'sequence'
            else 'table' end as kind, c.oid::regclass::text as name
        from pg_class as c
        where c.relnamespace = home and c.relowner <> owner and c.relkind in ('r', 'p', 'v', 'm', 'S')
            -- The sequence of an identity column goes with its table.
            and not exists (
                select from pg_depend as d
                where d.classid = 'pg_class'::regclass and d.objid = c.oid and d.deptype in ('i', 'a')
                    and c.relkind = 'S')
        union all
        select 'routine', p.oid::regprocedure::text from pg_proc as p
        where p.pronamespace = home and p.proowner <> owner
    loop
        execute format('alter %s %s owner to taskd_owner', o.kind, o.name);
    end loop;
end
$$;

-- Nothing is given to everybody; each role starts with nothing.
do $$
declare
    roles constant text := 'public, taskd_api, taskd_worker, taskd_submit, taskd_ro';
    home constant text := (
        select c.relnamespace::regnamespace::text from pg_class as c where c.oid = 'taskd.jobs'::regclass);
    base constant text := current_database();
    spared boolean;
    rights text[];
    s record;
begin
    execute format('revoke all on schema %s from %s', home, roles);
    execute format('revoke all on all tables in schema %s from %s', home, roles);
    execute format('revoke all on all sequences in schema %s from %s', home, roles);
    execute format('revoke all on all routines in schema %s from %s', home, roles);
    execute format('grant usage on schema %s to taskd_api, taskd_worker, taskd_submit, taskd_ro', home);
    -- What later migrations make is closed until this file runs again: a table may hold secrets.
    alter default privileges for role taskd_owner revoke execute on routines from public;
    if has_database_privilege(base, 'connect with grant option') then
        execute format('grant connect on database %I to taskd_owner, taskd_api, taskd_worker, taskd_submit, '
            'taskd_ro', base);
    end if;
    -- `create schema if not exists` asks for it even where the schema is there.
    if has_database_privilege(base, 'create with grant option') then
        execute format('grant create on database %I to taskd_owner', base);
    end if;

    -- Nobody makes anything in `public`. Where others keep things in it they go on finding them.
    select n.nspowner, array(
        select a.privilege_type from aclexplode(coalesce(n.nspacl, acldefault('n', n.nspowner))) as a
        where a.grantee = 0) as given
    into s from pg_namespace as n where n.nspname = 'public';
    if found then
        spared := exists (
            select from pg_depend as d
            where d.refclassid = 'pg_namespace'::regclass and d.refobjid = 'public'::regnamespace);
        rights := case when spared then '{CREATE}'::text[] else '{CREATE,USAGE}' end;
        if s.given && rights then
            if pg_has_role(s.nspowner, 'usage') then
                execute format('revoke %s on schema public from public',
                    case when spared then 'create' else 'all' end);
            else
                raise warning 'everybody has % on schema public, and its owner % alone can end that',
                    array_to_string(s.given, ', '), s.nspowner::regrole;
            end if;
        end if;
    end if;
end
$$;

-- Functions that need rights of their caller's that the caller is not to have. All others run as the caller.
-- A migration that replaces one of these must say both again: CREATE OR REPLACE forgets them.
do $$
declare
    f record;
begin
    for f in
        select p.oid::regprocedure::text as name
        from pg_proc as p join pg_class as c on c.relnamespace = p.pronamespace
        where c.oid = 'taskd.jobs'::regclass
            and p.proname in ('submit', 'submit_many', 'take_tokens', 'cancel_jobs', 'retry_jobs')
    loop
        execute format('alter routine %s security definer set search_path = pg_catalog, pg_temp', f.name);
    end loop;
end
$$;

-- taskd api, and the commands that look: stores jobs and reads them, keeps keys. It cancels and retries jobs
-- by functions that know these moves, and changes none in any other way.
grant select on taskd.migrations, taskd.jobs, taskd.queue, taskd.outcomes, taskd.history, taskd.unique_keys,
    taskd.lanes, taskd.nodes, taskd.types, taskd.node_types, taskd.cancel_requests, taskd.api_keys, taskd.audit
    to taskd_api;
grant insert on taskd.jobs, taskd.unique_keys, taskd.lanes to taskd_api;
grant insert (id, run_at, expires_at, priority, max_attempts, keyed, type) on taskd.queue to taskd_api;
grant insert (id, client, name, description, prefix, public_id, digest, pepper_version, fingerprint, scopes,
    types, rate, burst, max_pending, expires_at, rotated_from) on taskd.api_keys to taskd_api;
-- Never whose key it is, nor what it is compared with.
grant update (name, description, scopes, types, rate, burst, max_pending, expires_at, revoked_at,
    last_used_at) on taskd.api_keys to taskd_api;
grant execute on function taskd.moment, taskd.insert_jobs, taskd.waiting_of, taskd.history_of,
    taskd.take_tokens, taskd.cancel_jobs, taskd.retry_jobs to taskd_api;

-- taskd worker: moves jobs, says what it serves, prunes. It knows no keys, and rewrites nothing that was
-- asked for or has ended.
grant select on taskd.migrations, taskd.jobs, taskd.queue, taskd.outcomes, taskd.history, taskd.unique_keys,
    taskd.lanes, taskd.nodes, taskd.types, taskd.node_types, taskd.type_limits, taskd.running,
    taskd.cancel_requests to taskd_worker;
grant insert on taskd.jobs, taskd.outcomes, taskd.history, taskd.unique_keys, taskd.lanes, taskd.node_types,
    taskd.running to taskd_worker;
grant insert (id, run_at, expires_at, priority, max_attempts, keyed, type) on taskd.queue to taskd_worker;
grant insert (name, host, pid, version, lease, lease_until, info) on taskd.nodes to taskd_worker;
grant insert (type, info, published_by) on taskd.types to taskd_worker;
grant insert (type, interval_us, burst, max_running) on taskd.type_limits to taskd_worker;
grant update (run_at, expires_at, started_at, node, claim, attempts, crashes, claimed, alone, counted, error)
    on taskd.queue to taskd_worker;
grant update (state, lease_until, heartbeat_at, ended_at, search_from, search_file, search_again, info)
    on taskd.nodes to taskd_worker;
grant update (info, published_at, published_by, retired_at) on taskd.types to taskd_worker;
grant update (info) on taskd.node_types to taskd_worker;
grant update (interval_us, burst, max_running, tat) on taskd.type_limits to taskd_worker;
grant update (jobs) on taskd.running to taskd_worker;
grant delete on taskd.jobs, taskd.queue, taskd.outcomes, taskd.history, taskd.unique_keys, taskd.nodes,
    taskd.node_types, taskd.type_limits, taskd.running to taskd_worker;
grant execute on function taskd.moment, taskd.insert_jobs, taskd.claim, taskd.take_starts, taskd.count_starts,
    taskd.settle_completed, taskd.settle_others, taskd.places, taskd.free_keys, taskd.rescue, taskd.take_away,
    taskd.floors, taskd.cancel_jobs to taskd_worker;

-- The audit log takes entries, with the time and the number that the database gives them.
grant insert (actor, action, target, address, request_id, detail) on taskd.audit to taskd_api, taskd_worker;

-- Applications that submit in their own transactions.
grant execute on function taskd.submit, taskd.submit_many to taskd_submit;

-- People and dashboards: all but what a key is compared with.
grant select on taskd.job_view, taskd.migrations, taskd.jobs, taskd.queue, taskd.outcomes, taskd.history,
    taskd.unique_keys, taskd.lanes, taskd.nodes, taskd.types, taskd.node_types, taskd.type_limits,
    taskd.running, taskd.cancel_requests, taskd.schedules, taskd.key_buckets, taskd.audit to taskd_ro;
grant select (id, client, name, description, prefix, public_id, pepper_version, fingerprint, scopes, types,
    rate, burst, max_pending, created_at, expires_at, revoked_at, last_used_at, rotated_from)
    on taskd.api_keys to taskd_ro;
grant execute on function taskd.history_of to taskd_ro;
