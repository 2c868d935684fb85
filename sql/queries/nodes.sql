-- Worker nodes: one row a start of a daemon.

-- name: register_node
insert into taskd.nodes (name, host, pid, version, lease, lease_until, info)
values (%(name)s, %(host)s, %(pid)s, %(version)s, %(lease)s, clock_timestamp() + %(lease)s, %(info)s)
returning id;

-- name: heartbeat
-- Fenced: a node that was marked dead never gets its lease back. Says too whether there is anybody to
-- rescue, so that nothing else has to ask as long as there is not.
update taskd.nodes as n
set lease_until = clock_timestamp() + n.lease, heartbeat_at = clock_timestamp(), state = %(state)s,
    info = %(info)s
where n.id = %(node)s and n.state in ('live', 'draining')
returning n.heartbeat_at as at, exists (
    select from taskd.nodes as o
    where (o.state in ('live', 'draining')
            and (o.lease_until < clock_timestamp()
                or o.lease_until > clock_timestamp() + o.lease + interval '1 s'))  -- the clock went back
        or o.search_from is not null) as overdue;

-- name: known_node
-- Whether this incarnation, by the word of a lock file, really is an earlier start of the node on this
-- host: the file may be of another database.
select n.id from taskd.nodes as n
where n.id = %(node)s and n.name = %(name)s and n.host = %(host)s and n.pid = %(pid)s
    and n.state in ('live', 'draining');

-- name: node_ended
-- FOR UPDATE waits for claims of this node that are still under way in the server; none succeeds later.
with mine as (
    select n.id from taskd.nodes as n
    where n.id = %(node)s and n.state in ('live', 'draining') for update
), uncounted as (
    delete from taskd.running as r using mine where r.node = mine.id
)
update taskd.nodes as n set state = 'gone', ended_at = clock_timestamp()
from mine where n.id = mine.id
returning n.id;

-- name: forget_nodes
-- Rows of nodes that ended long ago; history names them by number, so they stay for as long as it does.
-- They hold nothing: a rescue or their good-bye saw to that, and neither can claim any more.
delete from taskd.nodes as n
where n.state in ('gone', 'dead') and n.ended_at < clock_timestamp() - %(age)s::interval
    and n.search_from is null;

-- name: list_nodes
select n.id, n.name, n.host, n.pid, n.version, n.state, n.started_at, n.heartbeat_at, n.lease_until,
    n.ended_at, n.info::text as info,
    array(select t.type from taskd.node_types as t where t.node = n.id order by 1) as types
from taskd.nodes as n
where n.state in ('live', 'draining') or n.ended_at > clock_timestamp() - interval '1 day'
order by n.id desc
limit 200;

-- name: server_facts
select current_setting('server_version_num')::integer as version,
    current_setting('server_version') as version_text,
    current_setting('fsync') as fsync,
    current_setting('full_page_writes') as full_page_writes,
    current_setting('synchronous_commit') as synchronous_commit,
    current_setting('default_transaction_read_only') as read_only,
    pg_is_in_recovery() as in_recovery,
    clock_timestamp() as clock,
    -- The server takes no new number within three million of the wrap-around (SetTransactionIdLimit).
    2147483647 - 3000000 - (select max(age(d.datfrozenxid)) from pg_database as d) as numbers_left,
    coalesce((
        select min(c.relpersistence::text) from pg_class as c
        where c.relnamespace = to_regnamespace(%(schema)s) and c.relkind = 'r' and c.relpersistence <> 'p'
    ), 'p') as persistence;

-- name: timeline
-- Which life of the primary this is: each promotion begins another. Null on a standby, which has none.
select case when not pg_is_in_recovery() then left(pg_walfile_name(pg_current_wal_lsn()), 8) end;

-- name: ping
select pg_notify(%(channel)s, %(text)s);

-- name: vitals
-- What an operator should be told of the server. Sessions of other roles are seen with pg_read_all_stats. A transaction that has a number holds vacuum back as a snapshot does, and so does one
-- that is prepared. A standby or a slot says no time, only which transaction it holds: who looks again sees
-- whether that moves. Apart from the ping: the queue's usage counts most when no NOTIFY gets into it any more.
select pg_notification_queue_usage() as notify_usage,
    coalesce(extract(epoch from clock_timestamp() - least(
        (select min(a.xact_start) from pg_stat_activity as a
        where (a.backend_xmin is not null or a.backend_xid is not null) and a.pid <> pg_backend_pid()
            and a.backend_type = 'client backend'),
        (select min(x.prepared) from pg_prepared_xacts as x))), 0)::double precision as oldest_snapshot_s,
    (select h.xid::text
    from (
        select a.backend_xmin as xid from pg_stat_activity as a where a.backend_type = 'walsender'
        union all select r.xmin from pg_replication_slots as r
        union all select r.catalog_xmin from pg_replication_slots as r) as h
    where h.xid is not null
    order by age(h.xid) desc limit 1) as held_xid;
