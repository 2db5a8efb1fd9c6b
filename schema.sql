-- The schema, embedded in the binary: a list of steps, which database.migrate in db.go applies in
-- order, each one once. The comment on the table tells how many a database has.
--
-- To change the schema, append a step; never edit one that was released. A step runs in a
-- transaction, while the previous release still serves: docs/moving.md lists what is safe.
-- Only step 1 is repeated, to restore a missing index, so its statements are safe to repeat.

-- step 1: create the table and its indexes
CREATE TABLE IF NOT EXISTS public.tasks (
    -- The token's sub. Opaque, compared byte for byte, hence "C". No foreign key to Better Auth's "user":
    -- that table may not exist yet, and its id may be text, uuid or integer.
    user_id     text COLLATE "C" NOT NULL CHECK (octet_length(user_id) BETWEEN 1 AND 512),
    id          bigint GENERATED ALWAYS AS IDENTITY,  -- grows with every task created, never reused
    title       text NOT NULL CHECK (char_length(title) BETWEEN 1 AND 200),
    description text CHECK (char_length(description) <= 1000),
    completed   boolean NOT NULL DEFAULT false,
    created_at  timestamptz NOT NULL DEFAULT now(),
    updated_at  timestamptz NOT NULL DEFAULT now(),   -- grows with every change: it is the task's version too

    -- Of the request that created the task, if it had an Idempotency-Key. The hash identifies its body.
    idempotency_key text COLLATE "C" CHECK (octet_length(idempotency_key) BETWEEN 1 AND 255),
    request_hash    bytea,

    -- The user first: one index isolates, finds and, read backwards, lists newest first.
    PRIMARY KEY (user_id, id)
);

-- The same for a list with ?completed=.
CREATE INDEX IF NOT EXISTS tasks_user_id_completed_id_idx ON public.tasks (user_id, completed, id);

-- One task for a key of a user, whichever instance asks first. Keyless tasks take no room in it.
CREATE UNIQUE INDEX IF NOT EXISTS tasks_user_id_idempotency_key_idx ON public.tasks (user_id, idempotency_key)
    WHERE idempotency_key IS NOT NULL;
