-- Written by: command handlers, after long loads.
-- Read by: command handlers; a snapshot of another schema is ignored, and all may be deleted at any time.
CREATE TABLE kafold_snapshot (
    category        TEXT COLLATE "C" NOT NULL,
    stream_id       TEXT COLLATE "C" NOT NULL,
    version         BIGINT NOT NULL,
    schema          TEXT NOT NULL,         -- tells which code can read the state
    state           BYTEA NOT NULL,        -- JSON
    recent_commands TEXT NOT NULL,         -- JSON: [[command id, version, position], ...], oldest first
    saved_at        TIMESTAMPTZ NOT NULL,
    PRIMARY KEY (category, stream_id)
);
