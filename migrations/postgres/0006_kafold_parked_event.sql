-- Written by: projection workers when an event fails for good, and for every later event of its stream.
-- Read by: projection workers, to keep a stream's order; the commands that show, retry and skip.
CREATE TABLE kafold_parked_event (
    projection  TEXT COLLATE "C" NOT NULL,
    generation  INTEGER NOT NULL,
    partition   INTEGER NOT NULL,
    "offset"    BIGINT NOT NULL,
    category    TEXT COLLATE "C" NOT NULL,
    stream_id   TEXT COLLATE "C" NOT NULL,
    version     BIGINT NOT NULL,
    event_id    UUID NOT NULL,
    event_type  TEXT NOT NULL,
    recorded_at TIMESTAMPTZ NOT NULL,
    command_id  UUID NOT NULL,
    metadata    TEXT,
    payload     BYTEA NOT NULL,
    error       TEXT,                      -- NULL: parked only because an earlier event of its stream is
    attempts    INTEGER NOT NULL,
    retry       BOOLEAN NOT NULL,          -- asked for by an operator, done by a worker
    parked_at   TIMESTAMPTZ NOT NULL,
    PRIMARY KEY (projection, generation, partition, "offset"),
    UNIQUE (projection, generation, category, stream_id, version)
);
