-- name: append_audit
insert into taskd.audit (actor, action, target, address, request_id, detail)
values (%(actor)s, %(action)s, %(target)s, %(address)s, %(request_id)s, %(detail)s::jsonb);

-- name: list_audit
select id, at, actor, action, target, address, request_id, detail::text as detail
from taskd.audit
where %(before)s::bigint is null or id < %(before)s::bigint
order by id desc
limit %(limit)s;

-- name: prune_audit
-- Oldest first, in pieces, so that no one delete holds much.
delete from taskd.audit
where id = any(array(
    select id from taskd.audit
    where at < clock_timestamp() - %(age_s)s * interval '1 s'
    order by id
    limit %(limit)s));
