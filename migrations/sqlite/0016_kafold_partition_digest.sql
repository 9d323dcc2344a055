-- Written by: the owner of a partition, now and then and when it hands the partition over.
-- Read by: the next owner, which then need not add up the heads of all streams before it answers. A row that was changed is
-- as good as none.
CREATE TABLE kafold_partition_digest (
    partition   INTEGER PRIMARY KEY,
    next_offset INTEGER NOT NULL,          -- the digests are of all events below it
    fold_state  TEXT NOT NULL,             -- the reader's state there
    digests     BLOB NOT NULL,             -- of each bucket of streams, 8 bytes, little endian
    checksum    INTEGER NOT NULL           -- of everything else in the row
) STRICT;
