-- Written by: projection workers when an event fails for good, and for every later event of its stream.
-- Read by: projection workers, to keep a stream's order; the commands that show, retry and skip.
CREATE TABLE kafold_parked_event (
    projection  TEXT NOT NULL,
    generation  INTEGER NOT NULL,
    partition   INTEGER NOT NULL,
    "offset"    INTEGER NOT NULL,
    category    TEXT NOT NULL,
    stream_id   TEXT NOT NULL,
    version     INTEGER NOT NULL,
    event_id    BLOB NOT NULL,
    event_type  TEXT NOT NULL,
    recorded_at INTEGER NOT NULL,
    command_id  BLOB NOT NULL,
    metadata    TEXT,
    payload     BLOB NOT NULL,
    error       TEXT,                      -- NULL: parked only because an earlier event of its stream is
    attempts    INTEGER NOT NULL,
    retry       INTEGER NOT NULL CHECK (retry IN (0, 1)), -- asked for by an operator, done by a worker
    parked_at   INTEGER NOT NULL,
    PRIMARY KEY (projection, generation, partition, "offset"),
    UNIQUE (projection, generation, category, stream_id, version)
) STRICT;
