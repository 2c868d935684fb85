-- Why: API keys, the buckets of their rate limits with the function that takes tokens, and the audit log.
-- Lock: none that matters, everything is new.
-- Safe with old code: yes, nothing that exists changes.

-- A key is kept after it was revoked: lists, the audit log and the jobs of its client refer to it.
-- `client` is the id of the client's first key. `digest` is all that is kept of the secret.
create table taskd.api_keys (
    id uuid primary key,
    client uuid not null,
    name text not null,
    description text,
    prefix text collate "C" not null,
    public_id text collate "C" not null unique,
    digest bytea not null check (length(digest) = 32),
    pepper_version smallint not null default 0,
    fingerprint text collate "C" not null,
    scopes text[] not null,
    types text[],
    rate numeric check (rate > 0 and rate <= 1000000),
    burst integer check (burst between 1 and 1000000),
    max_pending integer check (max_pending >= 0),
    created_at timestamptz not null default clock_timestamp(),
    expires_at timestamptz,
    revoked_at timestamptz,
    last_used_at timestamptz
) with (fillfactor = 80);
comment on column taskd.api_keys.pepper_version is '0: plain SHA-256; 1 and above: HMAC with that pepper';
comment on column taskd.api_keys.types is 'null: every job type';
comment on column taskd.api_keys.rate is 'requests a second; null: the configured default, as for burst';
create index api_keys_client on taskd.api_keys (client);

-- What has passed of each key's rate limit, in the units of taskd/model/bucket.py. No foreign key: one key
-- that is gone must not fail the statement that takes tokens for a hundred others. No index but the key's,
-- so that every update is HOT.
create table taskd.key_buckets (
    key uuid primary key,
    debt bigint not null,
    at_us bigint not null
) with (
    fillfactor = 20,
    autovacuum_vacuum_scale_factor = 0,
    autovacuum_vacuum_threshold = 1000,
    autovacuum_vacuum_cost_delay = 0
);
comment on column taskd.key_buckets.debt is 'millionths of a millionth of a token, as it was at at_us';
comment on column taskd.key_buckets.at_us is 'microseconds, Unix time, by the clock of the database';

-- Takes tokens for many keys at once: up to `p_wants`, or none where fewer than `p_least` are there. One
-- row comes back for each place of the arrays; a key may stand there more than once. Same sums as `take`
-- in taskd/model/bucket.py, where they are explained.
--
-- Must be a transaction of its own: it gives up the wait for fsync, so that a crash of the server may
-- forget what passed in its last moments. Rows are locked in the order of their keys, and the clock is
-- read after the lock: a reading from before a wait would be older than what the row says.
create function taskd.take_tokens(
    p_keys uuid[], p_wants integer[], p_least integer[], p_micro_rates bigint[], p_bursts integer[]
) returns table (place integer, granted integer, remaining integer, wait_us bigint, reset_us bigint)
language plpgsql
as $$
declare
    token constant bigint := 1000000000000;
    v_debt bigint;
    v_at bigint;
    v_now bigint;
    full_debt bigint;
    room integer;
begin
    perform set_config('synchronous_commit', 'off', true);
    for place in
        select s.i from generate_subscripts(p_keys, 1) as s (i) order by p_keys[s.i], s.i
    loop
        select b.debt, b.at_us into v_debt, v_at
        from taskd.key_buckets as b where b.key = p_keys[place] for update;
        if not found then
            insert into taskd.key_buckets (key, debt, at_us) values (p_keys[place], 0, 0)
            on conflict do nothing;
            select b.debt, b.at_us into v_debt, v_at
            from taskd.key_buckets as b where b.key = p_keys[place] for update;
        end if;
        v_now := (extract(epoch from clock_timestamp()) * 1000000)::bigint;
        full_debt := p_bursts[place] * token;
        -- numeric: a bucket untouched for years at the highest rate goes beyond bigint.
        v_debt := least(
            greatest(v_debt - (v_now - v_at)::numeric * p_micro_rates[place], 0), full_debt)::bigint;
        room := (full_debt - v_debt) / token;
        granted := case when room >= p_least[place] then least(p_wants[place], room) else 0 end;
        v_debt := v_debt + granted * token;
        if granted > 0 or v_now < v_at then
            update taskd.key_buckets as b set debt = v_debt, at_us = v_now where b.key = p_keys[place];
        end if;
        remaining := room - granted;
        wait_us := case when p_least[place] <= p_bursts[place] then greatest(
            0, (v_debt + p_least[place] * token - full_debt + p_micro_rates[place] - 1)
                / p_micro_rates[place]) end;
        reset_us := (v_debt + p_micro_rates[place] - 1) / p_micro_rates[place];
        return next;
    end loop;
end
$$;

-- Who did what to keys, jobs, types and configuration. Rows are only ever added, and pruned by age.
create table taskd.audit (
    id bigint generated always as identity primary key,
    at timestamptz not null default clock_timestamp(),
    actor text not null,
    action text collate "C" not null,
    target text,
    address text,
    request_id text,
    detail jsonb not null default '{}'
);
create index audit_at on taskd.audit using brin (at);
