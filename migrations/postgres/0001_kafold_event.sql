-- Written by: the owner of a partition, behind the log (StreamIndex); the embedded store, whose log this table is.
-- Read by: loading of streams and finding of commands; the embedded store's event source.
CREATE TABLE kafold_event (
    category    TEXT COLLATE "C" NOT NULL,
    stream_id   TEXT COLLATE "C" NOT NULL, -- the part behind the first '-'
    version     BIGINT NOT NULL,           -- 1..n within the stream
    partition   INTEGER NOT NULL,
    "offset"    BIGINT NOT NULL,
    event_id    UUID NOT NULL,
    event_type  TEXT NOT NULL,             -- such as order.placed.v1
    recorded_at TIMESTAMPTZ NOT NULL,
    command_id  UUID NOT NULL,
    metadata    TEXT,                      -- JSON: correlation_id, causation_id, trace_parent; NULL when it has none
    payload     BYTEA NOT NULL,            -- exactly the bytes that were appended
    PRIMARY KEY (category, stream_id, version),
    UNIQUE (partition, "offset")
);

CREATE INDEX kafold_event_command ON kafold_event (category, stream_id, command_id);
