-- Written by: the stream index, in the transaction that adds the events.
-- Read by: the stream index at start and at every load; a partition without a row stands at 0.
CREATE TABLE kafold_partition (
    partition   INTEGER PRIMARY KEY,
    next_offset BIGINT NOT NULL,           -- everything accepted below it is in kafold_event
    fold_state  TEXT NOT NULL,             -- the reader's state there
    updated_at  TIMESTAMPTZ NOT NULL       -- when the position last moved
);
