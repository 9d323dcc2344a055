-- Written by: projection workers, in the transaction that writes the rows of the read model.
-- Read by: projection workers when they take a partition, wait_for, and status commands.
CREATE TABLE kafold_checkpoint (
    projection      TEXT NOT NULL,
    generation      INTEGER NOT NULL,
    partition       INTEGER NOT NULL,
    next_offset     INTEGER NOT NULL,      -- everything below it is applied
    fold_state      TEXT NOT NULL,         -- the event source's state there, handed back unread
    fence           INTEGER NOT NULL,      -- raised by each worker that takes the partition
    end_offset      INTEGER,               -- end of the partition as last seen: the lag in records
    last_event_at   INTEGER,               -- when the last applied event was recorded: the lag in seconds
    updated_at      INTEGER NOT NULL,
    PRIMARY KEY (projection, generation, partition)
) STRICT;
