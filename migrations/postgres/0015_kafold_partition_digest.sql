-- Written by: the owner of a partition, now and then and when it hands the partition over.
-- Read by: the next owner, which then need not add up the heads of all streams before it answers. A row that was changed is
-- as good as none.
CREATE TABLE kafold_partition_digest (
    partition   INTEGER PRIMARY KEY,
    next_offset BIGINT NOT NULL,           -- the digests are of all events below it
    fold_state  TEXT NOT NULL,             -- the reader's state there
    digests     BYTEA NOT NULL,            -- of each bucket of streams, 8 bytes, little endian
    checksum    BIGINT NOT NULL            -- of everything else in the row
);
-- Digests cannot be compressed.
ALTER TABLE kafold_partition_digest ALTER COLUMN digests SET STORAGE EXTERNAL;
