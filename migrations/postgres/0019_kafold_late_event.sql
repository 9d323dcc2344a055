-- Written by: the worker of a windowed model, in the transaction that writes the rows of the model.
-- Read by: the commands late list and late summary. At most 100,000 rows a partition and generation.
CREATE TABLE kafold_late_event (
    projection  TEXT COLLATE "C" NOT NULL,
    generation  BIGINT NOT NULL,
    partition   BIGINT NOT NULL,
    "offset"    BIGINT NOT NULL,
    kind        TEXT NOT NULL,         -- late: for at least one window; future: stamped ahead of the recording
    category    TEXT COLLATE "C" NOT NULL,
    stream_id   TEXT COLLATE "C" NOT NULL,
    version     BIGINT NOT NULL,
    at          TIMESTAMPTZ NOT NULL,  -- the time of the event
    clock       TIMESTAMPTZ,           -- the clock of the partition before the event
    windows     BIGINT NOT NULL,       -- windows for which the event is late
    grace_us    BIGINT,                -- least grace that takes the event in, if it is late for all of its windows
    PRIMARY KEY (projection, generation, partition, "offset")
);
