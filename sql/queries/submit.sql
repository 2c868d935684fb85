-- What the door needs beside the job itself.

-- name: existing_jobs
-- Which of these ids are stored: asked when the answer to an insert was lost.
select id::text from taskd.jobs where id = any(%(ids)s::uuid[]);
