-- Job types as the nodes publish them.

-- name: publish_types
-- The newest publication decides what the door fills in; what each live node accepts stands beside it.
with given as (
    select v.type, v.info from unnest(%(types)s::text[], %(infos)s::text[]) as v (type, info)
), kept as (
    insert into taskd.types as t (type, info, published_by)
    select g.type, g.info::json, %(node)s from given as g order by g.type
    on conflict (type) do update
    set info = excluded.info, published_at = clock_timestamp(), published_by = excluded.published_by,
        retired_at = null
), told as (
    insert into taskd.node_types as n (node, type, info)
    select %(node)s, g.type, g.info::json from given as g where %(node)s::bigint is not null
    on conflict (node, type) do update set info = excluded.info
)
select count(*) from given;

-- name: withdraw_types
delete from taskd.node_types as n where n.node = %(node)s;

-- name: set_limits
-- The strictest of the live nodes. A type that no node limits any more loses its row.
with wanted as (
    select n.type,
        -- Rounded up: never faster than asked for.
        ceil(max(1000000.0 / nullif((n.info->>'rate')::numeric, 0)))::bigint as interval_us,
        min(coalesce((n.info->>'rate_burst')::integer, 1)) filter (where n.info->>'rate' is not null) as burst,
        min((n.info->>'max_running')::integer) as max_running
    from taskd.node_types as n join taskd.nodes as m on m.id = n.node and m.state in ('live', 'draining')
    group by n.type
), limited as (
    select w.type, w.interval_us, coalesce(w.burst, 1) as burst, w.max_running
    from wanted as w where w.interval_us is not null or w.max_running is not null
), gone as (
    delete from taskd.type_limits as l
    where l.type in (select w.type from wanted as w) and l.type not in (select k.type from limited as k)
)
insert into taskd.type_limits as l (type, interval_us, burst, max_running)
select k.type, k.interval_us, k.burst, k.max_running from limited as k order by k.type
on conflict (type) do update
set interval_us = excluded.interval_us, burst = excluded.burst, max_running = excluded.max_running
where (l.interval_us, l.burst, l.max_running)
    is distinct from (excluded.interval_us, excluded.burst, excluded.max_running);

-- name: known_types
-- All that the door needs: the newest publication of each type and the schemas of the live nodes.
select t.type, t.info::text as info,
    t.paused_at is not null and (t.paused_until is null or t.paused_until > clock_timestamp()) as paused,
    t.paused_reason,
    t.retired_at is not null as retired,
    array(
        select n.info::text from taskd.node_types as n
        join taskd.nodes as m on m.id = n.node
        where n.type = t.type and m.state = 'live' and m.lease_until > clock_timestamp()
    ) as live
from taskd.types as t
order by t.type;
