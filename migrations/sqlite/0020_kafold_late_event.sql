-- Written by: the worker of a windowed model, in the transaction that writes the rows of the model.
-- Read by: the commands late list and late summary. At most 100,000 rows a partition and generation.
CREATE TABLE kafold_late_event (
    projection  TEXT NOT NULL,
    generation  INTEGER NOT NULL,
    partition   INTEGER NOT NULL,
    "offset"    INTEGER NOT NULL,
    kind        TEXT NOT NULL,         -- late: for at least one window; future: stamped ahead of the recording
    category    TEXT NOT NULL,
    stream_id   TEXT NOT NULL,
    version     INTEGER NOT NULL,
    at          TEXT NOT NULL,         -- the time of the event
    clock       TEXT,                  -- the clock of the partition before the event
    windows     INTEGER NOT NULL,       -- windows for which the event is late
    grace_us    INTEGER,                -- least grace that takes the event in, if it is late for all of its windows
    PRIMARY KEY (projection, generation, partition, "offset")
) STRICT;
