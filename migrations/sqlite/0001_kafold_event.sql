-- Written by: the owner of a partition, behind the log (StreamIndex); the embedded store, whose log this table is.
-- Read by: loading of streams and finding of commands; the embedded store's event source.
CREATE TABLE kafold_event (
    category    TEXT NOT NULL,
    stream_id   TEXT NOT NULL,             -- the part behind the first '-'
    version     INTEGER NOT NULL,          -- 1..n within the stream
    partition   INTEGER NOT NULL,
    "offset"    INTEGER NOT NULL,
    event_id    BLOB NOT NULL,
    event_type  TEXT NOT NULL,             -- such as order.placed.v1
    recorded_at INTEGER NOT NULL,
    command_id  BLOB NOT NULL,
    metadata    TEXT,                      -- JSON: correlation_id, causation_id, trace_parent; NULL when it has none
    payload     BLOB NOT NULL,             -- exactly the bytes that were appended
    PRIMARY KEY (category, stream_id, version),
    UNIQUE (partition, "offset")
) STRICT;

CREATE INDEX kafold_event_command ON kafold_event (category, stream_id, command_id);
