-- What `/ready` tells.

-- name: applied_migrations
select version, digest from taskd.migrations order by version;

-- name: live_nodes
select count(*) from taskd.nodes as n where n.state = 'live' and n.lease_until > clock_timestamp();
