-- Written by: the trigger kafold_event_added, in the statement that adds events.
-- Read by: every load of a stream, which compares the head with the events and its bucket with the process's memory.
CREATE TABLE kafold_stream (
    partition INTEGER NOT NULL,
    hash      INTEGER NOT NULL,            -- XXH3 of the stream; streams with the same upper 12 bits are a bucket
    category  TEXT NOT NULL,
    stream_id TEXT NOT NULL,
    version   INTEGER NOT NULL,            -- of the stream's last event
    digest    INTEGER NOT NULL,            -- XOR of the digests of its events
    PRIMARY KEY (partition, hash, category, stream_id)
) STRICT, WITHOUT ROWID;

-- The index of a log on Kafka begins anew: events that are there have no digest. The owner of each partition feeds it
-- again from the log. A log in this file has no row in kafold_partition; its events get theirs when it is opened.
DELETE FROM kafold_event WHERE EXISTS (SELECT 1 FROM kafold_partition);
DELETE FROM kafold_partition;

ALTER TABLE kafold_event ADD COLUMN hash   INTEGER NOT NULL DEFAULT 0;     -- of the stream
ALTER TABLE kafold_event ADD COLUMN digest INTEGER NOT NULL DEFAULT 0;     -- of everything in the row

ALTER TABLE kafold_partition ADD COLUMN events   INTEGER NOT NULL DEFAULT 0; -- how many are in kafold_event below next_offset
ALTER TABLE kafold_partition ADD COLUMN digest   INTEGER NOT NULL DEFAULT 0; -- XOR of their digests and of the hashes of their streams
ALTER TABLE kafold_partition ADD COLUMN checksum INTEGER NOT NULL DEFAULT 0; -- of partition, next_offset and fold_state

-- What the log in this file holds. next_offset is -1 until the events that an older version left have their digests.
ALTER TABLE kafold_log ADD COLUMN next_offset INTEGER NOT NULL DEFAULT 0;
ALTER TABLE kafold_log ADD COLUMN digest      INTEGER NOT NULL DEFAULT 0;  -- XOR of the digests of its events
UPDATE kafold_log SET next_offset = -1 WHERE EXISTS (SELECT 1 FROM kafold_event);

-- (a | b) - (a & b) is a XOR b. An event that a head has already is one that was lost and is fed again. The first event of
-- a log on Kafka stands behind a claim, so that kafold_log of its index stays at 0.
CREATE TRIGGER kafold_event_added AFTER INSERT ON kafold_event BEGIN
    INSERT INTO kafold_stream (partition, hash, category, stream_id, version, digest)
    VALUES (NEW.partition, NEW.hash, NEW.category, NEW.stream_id, NEW.version, NEW.digest)
    ON CONFLICT (partition, hash, category, stream_id) DO UPDATE
    SET version = excluded.version, digest = (digest | excluded.digest) - (digest & excluded.digest)
    WHERE excluded.version > version;
    UPDATE kafold_log SET next_offset = next_offset + 1, digest = (digest | NEW.digest) - (digest & NEW.digest)
    WHERE next_offset = NEW."offset";
END;

-- Written by: `kafold index rebuild` and `kafold positions reset`, within their transaction; empty outside of it.
-- Read by: the triggers below. SQLite has no settings of a session.
CREATE TABLE kafold_unlocked (
    singleton INTEGER PRIMARY KEY CHECK (singleton = 1)
) STRICT;

-- Events whose digests are still to be filled in may be changed.
CREATE TRIGGER kafold_event_kept_update BEFORE UPDATE ON kafold_event
WHEN (OLD.digest <> 0 OR OLD.hash <> 0) AND NOT EXISTS (SELECT 1 FROM kafold_unlocked) BEGIN
    SELECT RAISE(ABORT, 'kafold_event is the log, or a copy of it, and is not changed by hand; to make a copy again: kafold index rebuild');
END;
CREATE TRIGGER kafold_event_kept_delete BEFORE DELETE ON kafold_event
WHEN NOT EXISTS (SELECT 1 FROM kafold_unlocked) BEGIN
    SELECT RAISE(ABORT, 'kafold_event is the log, or a copy of it, and is not changed by hand; to make a copy again: kafold index rebuild');
END;
CREATE TRIGGER kafold_stream_kept_update BEFORE UPDATE ON kafold_stream
WHEN NEW.version <= OLD.version AND NOT EXISTS (SELECT 1 FROM kafold_unlocked) BEGIN
    SELECT RAISE(ABORT, 'kafold_stream is made from the log and is not changed by hand; to make it again: kafold index rebuild');
END;
CREATE TRIGGER kafold_stream_kept_delete BEFORE DELETE ON kafold_stream
WHEN NOT EXISTS (SELECT 1 FROM kafold_unlocked) BEGIN
    SELECT RAISE(ABORT, 'kafold_stream is made from the log and is not changed by hand; to make it again: kafold index rebuild');
END;
CREATE TRIGGER kafold_partition_kept_update BEFORE UPDATE ON kafold_partition
WHEN NEW.next_offset <= OLD.next_offset AND NOT EXISTS (SELECT 1 FROM kafold_unlocked) BEGIN
    SELECT RAISE(ABORT, 'kafold_partition is made from the log and is not changed by hand; to make it again: kafold index rebuild');
END;
CREATE TRIGGER kafold_partition_kept_delete BEFORE DELETE ON kafold_partition
WHEN NOT EXISTS (SELECT 1 FROM kafold_unlocked) BEGIN
    SELECT RAISE(ABORT, 'kafold_partition is made from the log and is not changed by hand; to make it again: kafold index rebuild');
END;

-- A snapshot that was changed is as good as none.
DELETE FROM kafold_snapshot;
ALTER TABLE kafold_snapshot ADD COLUMN checksum INTEGER NOT NULL DEFAULT 0; -- of everything in the row but saved_at
