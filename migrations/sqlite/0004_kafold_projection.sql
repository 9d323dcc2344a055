-- Written by: projection workers (actual state, live generation) and whoever controls them (desired state).
-- Read by: projection workers, status commands, and queries that choose the live generation.
CREATE TABLE kafold_projection (
    name                TEXT NOT NULL PRIMARY KEY,
    live_generation     INTEGER NOT NULL,  -- the one that queries see
    fingerprint         TEXT NOT NULL,     -- of the definition that built it
    next_generation     INTEGER,           -- the one being built beside it, if any
    next_fingerprint    TEXT,
    next_requested_at   INTEGER,
    desired_state       TEXT NOT NULL CHECK (desired_state IN ('running', 'paused')),
    actual_state        TEXT NOT NULL CHECK (actual_state IN ('running', 'paused', 'rebuilding', 'stopped')),
    actual_state_reason TEXT,              -- why it waits or stopped, one sentence
    updated_at          INTEGER NOT NULL
) STRICT;
