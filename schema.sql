-- The schema, embedded in the binary: a list of steps. database.applySteps in db.go applies each
-- step once, in order. The table's comment contains the number of the last applied step.
--
-- To change the schema, append a step. Never edit a step that was released. A step runs in one
-- transaction, while the previous release still serves: docs/moving.md lists which steps are safe.

-- step 1: create the table and its indexes
CREATE TABLE public.tasks (
    -- The token's sub. It is opaque; COLLATE "C" compares it byte by byte. It has no foreign key to
    -- Better Auth's table "user", which may not exist yet and whose id is text, uuid or integer.
    user_id     text COLLATE "C" NOT NULL CHECK (octet_length(user_id) BETWEEN 1 AND 512),
    id          bigint GENERATED ALWAYS AS IDENTITY,  -- increases with every create, never reused
    title       text NOT NULL CHECK (char_length(title) BETWEEN 1 AND 200),
    description text CHECK (char_length(description) <= 1000),
    completed   boolean NOT NULL DEFAULT false,
    created_at  timestamptz NOT NULL DEFAULT now(),
    updated_at  timestamptz NOT NULL DEFAULT now(),   -- increases with every change: the version

    -- The Idempotency-Key of the request that created the task, and a hash of the request's body.
    -- Both are null if the request had no key.
    idempotency_key text COLLATE "C" CHECK (octet_length(idempotency_key) BETWEEN 1 AND 255),
    request_hash    bytea,

    -- The user comes first, so that one index isolates users, finds a task and, read backward,
    -- lists the newest tasks first.
    PRIMARY KEY (user_id, id)
);

-- For lists with ?completed=.
CREATE INDEX tasks_user_id_completed_id_idx
    ON public.tasks (user_id, completed, id);

-- At most one task for a user's key, even if two instances receive it at the same time. Tasks
-- without a key are not in this index.
CREATE UNIQUE INDEX tasks_user_id_idempotency_key_idx
    ON public.tasks (user_id, idempotency_key)
    WHERE idempotency_key IS NOT NULL;
