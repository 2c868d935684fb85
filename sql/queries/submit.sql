-- What the door needs beside the job itself.

-- name: existing_jobs
-- Which of these ids are stored, and since when: asked when the answer to an insert was lost.
select id::text, (extract(epoch from created_at) * 1000000)::bigint from taskd.jobs where id = any(%(ids)s::uuid[]);
