-- name: create_key
-- Makes a client of its own when :client is null; returns nothing when there is no client :client.
insert into taskd.api_keys (id, client, name, description, prefix, public_id, digest, pepper_version,
                            fingerprint, scopes, types, rate, burst, max_pending, expires_at)
select %(id)s::uuid, coalesce(%(client)s::uuid, %(id)s::uuid), %(name)s, %(description)s, %(prefix)s,
    %(public_id)s, %(digest)s, %(pepper_version)s, %(fingerprint)s, %(scopes)s::text[], %(types)s::text[],
    %(rate)s::numeric, %(burst)s::integer, %(max_pending)s::integer, %(expires_at)s::timestamptz
where %(client)s::uuid is null
    or exists (select 1 from taskd.api_keys as k where k.client = %(client)s::uuid)
returning id, client, name, description, prefix, public_id, digest, pepper_version, fingerprint, scopes, types,
    rate, burst, max_pending, created_at, expires_at, revoked_at, last_used_at, rotated_from,
    revoked_at is null and (expires_at is null or expires_at > clock_timestamp()) as live;

-- name: list_keys
select id, client, name, description, prefix, public_id, digest, pepper_version, fingerprint, scopes, types,
    rate, burst, max_pending, created_at, expires_at, revoked_at, last_used_at, rotated_from,
    revoked_at is null and (expires_at is null or expires_at > clock_timestamp()) as live
from taskd.api_keys
order by created_at desc, id desc
limit %(limit)s;

-- name: get_key
select id, client, name, description, prefix, public_id, digest, pepper_version, fingerprint, scopes, types,
    rate, burst, max_pending, created_at, expires_at, revoked_at, last_used_at, rotated_from,
    revoked_at is null and (expires_at is null or expires_at > clock_timestamp()) as live
from taskd.api_keys
where id = %(id)s::uuid;

-- name: find_keys
select id, client, name, description, prefix, public_id, digest, pepper_version, fingerprint, scopes, types,
    rate, burst, max_pending, created_at, expires_at, revoked_at, last_used_at, rotated_from,
    revoked_at is null and (expires_at is null or expires_at > clock_timestamp()) as live
from taskd.api_keys
where public_id = any(%(public_ids)s::text[]);

-- name: change_key
-- Sets the members that :members names, null too, and leaves the others.
update taskd.api_keys
set name = case when 'name' = any(%(members)s::text[]) then %(name)s::text else name end,
    description = case when 'description' = any(%(members)s::text[]) then %(description)s::text
        else description end,
    scopes = case when 'scopes' = any(%(members)s::text[]) then %(scopes)s::text[] else scopes end,
    types = case when 'types' = any(%(members)s::text[]) then %(types)s::text[] else types end,
    rate = case when 'rate' = any(%(members)s::text[]) then %(rate)s::numeric else rate end,
    burst = case when 'burst' = any(%(members)s::text[]) then %(burst)s::integer else burst end,
    max_pending = case when 'max_pending' = any(%(members)s::text[]) then %(max_pending)s::integer
        else max_pending end,
    expires_at = case when 'expires_at' = any(%(members)s::text[]) then %(expires_at)s::timestamptz
        else expires_at end
where id = %(id)s::uuid
returning id, client, name, description, prefix, public_id, digest, pepper_version, fingerprint, scopes, types,
    rate, burst, max_pending, created_at, expires_at, revoked_at, last_used_at, rotated_from,
    revoked_at is null and (expires_at is null or expires_at > clock_timestamp()) as live;

-- name: lock_key
-- Keeps everybody else from changing the key until the end of the transaction.
select id, client, name, description, prefix, public_id, digest, pepper_version, fingerprint, scopes, types,
    rate, burst, max_pending, created_at, expires_at, revoked_at, last_used_at, rotated_from,
    revoked_at is null and (expires_at is null or expires_at > clock_timestamp()) as live
from taskd.api_keys
where id = %(id)s::uuid
for update;

-- name: rotation_keys
-- The live keys next to :id in its rotations: the one it was made in place of, and those made in place of it.
-- A statement of its own after the lock: its snapshot sees what whoever held the lock before has stored.
select k.id, k.client, k.name, k.description, k.prefix, k.public_id, k.digest, k.pepper_version, k.fingerprint,
    k.scopes, k.types, k.rate, k.burst, k.max_pending, k.created_at, k.expires_at, k.revoked_at,
    k.last_used_at, k.rotated_from, true as live
from taskd.api_keys as k
join taskd.api_keys as me on me.id = %(id)s::uuid and me.client = k.client
where (k.id = me.rotated_from or k.rotated_from = me.id)
    and k.revoked_at is null
    and (k.expires_at is null or k.expires_at > clock_timestamp())
order by k.created_at, k.id;

-- name: rotate_key
-- The new key takes over everything but its name part and secret; the old one ends after :overlap_s at
-- the latest. When :keep_span, the new one lives as long as the old one was made for. Returns nothing
-- when the old key is no longer live.
with old as (
    select * from taskd.api_keys
    where id = %(old)s::uuid
        and revoked_at is null
        and (expires_at is null or expires_at > clock_timestamp())
    for update
), ended as (
    update taskd.api_keys as k
    set expires_at = least(k.expires_at, clock_timestamp() + %(overlap_s)s * interval '1 s')
    from old
    where k.id = old.id
)
insert into taskd.api_keys (id, client, name, description, prefix, public_id, digest, pepper_version,
                            fingerprint, scopes, types, rate, burst, max_pending, expires_at, rotated_from)
select %(id)s::uuid, old.client, old.name, old.description, old.prefix, %(public_id)s, %(digest)s,
    %(pepper_version)s, %(fingerprint)s, old.scopes, old.types, old.rate, old.burst, old.max_pending,
    case when %(keep_span)s then clock_timestamp() + (old.expires_at - old.created_at)
        else %(expires_at)s::timestamptz end,
    old.id
from old
returning id, client, name, description, prefix, public_id, digest, pepper_version, fingerprint, scopes, types,
    rate, burst, max_pending, created_at, expires_at, revoked_at, last_used_at, rotated_from,
    revoked_at is null and (expires_at is null or expires_at > clock_timestamp()) as live;

-- name: revoke_key
-- Revoking again keeps the first time.
update taskd.api_keys
set revoked_at = coalesce(revoked_at, clock_timestamp())
where id = %(id)s::uuid
returning id, client, name, description, prefix, public_id, digest, pepper_version, fingerprint, scopes, types,
    rate, burst, max_pending, created_at, expires_at, revoked_at, last_used_at, rotated_from,
    revoked_at is null and (expires_at is null or expires_at > clock_timestamp()) as live;

-- name: touch_keys
-- At most once a minute a key. Skips what another process is writing: it writes the same.
update taskd.api_keys
set last_used_at = clock_timestamp()
where id = any(array(
    select id from taskd.api_keys
    where id = any(%(ids)s::uuid[])
        and (last_used_at is null or last_used_at < clock_timestamp() - interval '1 minute')
    order by id
    for update skip locked));

-- name: notify_key
-- Told to all processes when the transaction commits, and only then.
select pg_notify(%(channel)s, %(public_id)s);
