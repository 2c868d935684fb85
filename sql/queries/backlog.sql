-- How many jobs wait, counted up to a bound: what lies beyond it changes no decision.

-- name: count_of_type
select taskd.waiting_of(%(type)s, %(enough)s);

-- name: count_of_client
-- No index leads from a client to what waits, so this reads the client's newest :most jobs, as far back as
-- the oldest job of the queue. `offset 0` keeps one look-up a job whatever the planner thinks of the sizes.
select count(*) from (
    select from (
        select j.id from taskd.jobs as j
        where j.client = %(client)s::uuid
            and j.id >= (select q.id from taskd.queue as q order by q.id limit 1)
        order by j.id desc
        limit %(most)s
    ) as j
    cross join lateral (
        select from taskd.queue as q where q.id = j.id and not q.claimed offset 0
    ) as found
    limit %(enough)s
) as waiting;
