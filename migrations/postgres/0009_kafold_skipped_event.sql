-- Written by: the commands that skip an event.
-- Read by: projection workers, which leave these events out; verify, which leaves them out too.
CREATE TABLE kafold_skipped_event (
    projection  TEXT COLLATE "C" NOT NULL,
    generation  INTEGER NOT NULL,
    partition   INTEGER NOT NULL,
    "offset"    BIGINT NOT NULL,           -- of any event of a commit: commits are left out whole
    actor       TEXT NOT NULL,
    reason      TEXT NOT NULL,
    skipped_at  TIMESTAMPTZ NOT NULL,
    PRIMARY KEY (projection, generation, partition, "offset")
);

-- Workers ask several times a second what is to be retried.
CREATE INDEX kafold_parked_event_retry ON kafold_parked_event (projection, generation) WHERE retry;
