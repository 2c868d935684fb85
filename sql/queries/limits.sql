-- name: take_tokens
select place, granted, remaining, wait_us, reset_us
from taskd.take_tokens(%(keys)s::uuid[], %(wants)s::integer[], %(least)s::integer[],
                       %(micro_rates)s::bigint[], %(bursts)s::integer[]);

-- name: prune_buckets
-- Forgets the buckets of keys that are gone or can never be used again.
delete from taskd.key_buckets as b
where not exists (
    select 1 from taskd.api_keys as k
    where k.id = b.key
        and k.revoked_at is null
        and (k.expires_at is null or k.expires_at > clock_timestamp()));
