-- Written by: projection workers, in the transaction that writes the rows of the read model.
-- Read by: projection workers when they take a partition, wait_for, and status commands.
CREATE TABLE kafold_checkpoint (
    projection      TEXT COLLATE "C" NOT NULL,
    generation      INTEGER NOT NULL,
    partition       INTEGER NOT NULL,
    next_offset     BIGINT NOT NULL,       -- everything below it is applied
    fold_state      TEXT NOT NULL,         -- the event source's state there, handed back unread
    fence           BIGINT NOT NULL,       -- raised by each worker that takes the partition
    end_offset      BIGINT,                -- end of the partition as last seen: the lag in records
    last_event_at   TIMESTAMPTZ,           -- when the last applied event was recorded: the lag in seconds
    updated_at      TIMESTAMPTZ NOT NULL,
    PRIMARY KEY (projection, generation, partition)
);
