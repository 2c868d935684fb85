-- Why: which key a key was made in place of, so that a rotation knows who of both still lives.
-- Lock: api_keys, for a moment: a column without a default rewrites nothing, and the table is small.
-- Safe with old code: yes, it names its columns and leaves this one null.

alter table taskd.api_keys add column rotated_from uuid;
comment on column taskd.api_keys.rotated_from is 'the key that this one was made in place of';
