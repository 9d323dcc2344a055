-- Written by: command handlers, after long loads.
-- Read by: command handlers; a snapshot of another schema is ignored, and all may be deleted at any time.
CREATE TABLE kafold_snapshot (
    category        TEXT NOT NULL,
    stream_id       TEXT NOT NULL,
    version         INTEGER NOT NULL,
    schema          TEXT NOT NULL,         -- tells which code can read the state
    state           BLOB NOT NULL,         -- JSON
    recent_commands TEXT NOT NULL,         -- JSON: [[command id, version, position], ...], oldest first
    saved_at        INTEGER NOT NULL,
    PRIMARY KEY (category, stream_id)
) STRICT;
