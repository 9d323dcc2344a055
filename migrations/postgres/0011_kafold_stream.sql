-- Written by: the trigger kafold_event_added, in the statement that adds events to the stream index.
-- Read by: every load of a stream, which compares the head with the events and its bucket with the node's memory.
CREATE TABLE kafold_stream (
    partition INTEGER NOT NULL,
    hash      BIGINT NOT NULL,             -- XXH3 of the stream; streams with the same upper 12 bits are a bucket
    category  TEXT COLLATE "C" NOT NULL,
    stream_id TEXT COLLATE "C" NOT NULL,
    version   BIGINT NOT NULL,             -- of the stream's last event
    digest    BIGINT NOT NULL,             -- XOR of the digests of its events
    PRIMARY KEY (partition, hash, category, stream_id)
) WITH (fillfactor = 80);

-- The index begins anew: events that are there have no digest. The owner of each partition feeds it again from the log.
TRUNCATE kafold_event, kafold_partition;

ALTER TABLE kafold_event
    ADD COLUMN hash   BIGINT NOT NULL,     -- of the stream
    ADD COLUMN digest BIGINT NOT NULL,     -- of everything in the row
    -- Events are found by stream; without this B-tree a row costs less than it did before it had a head.
    DROP CONSTRAINT kafold_event_partition_offset_key;

ALTER TABLE kafold_partition
    ADD COLUMN events   BIGINT NOT NULL,   -- how many are in kafold_event below next_offset
    ADD COLUMN digest   BIGINT NOT NULL,   -- XOR of their digests and of the hashes of their streams
    ADD COLUMN checksum BIGINT NOT NULL;   -- of partition, next_offset and fold_state

-- The planner knows nothing of the rows that a statement has added, and must never read all heads for them.
CREATE FUNCTION kafold_event_added() RETURNS trigger LANGUAGE plpgsql
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off AS $$
BEGIN
    INSERT INTO kafold_stream AS s (partition, hash, category, stream_id, version, digest)
    SELECT partition, hash, category, stream_id, max(version), bit_xor(digest)
    FROM added a
    -- An event that a head has already is one that was lost and is fed again.
    WHERE version > COALESCE((SELECT h.version FROM kafold_stream h
                              WHERE h.partition = a.partition AND h.hash = a.hash
                                AND h.category = a.category AND h.stream_id = a.stream_id), 0)
    GROUP BY partition, hash, category, stream_id
    ORDER BY partition, hash, category, stream_id
    ON CONFLICT (partition, hash, category, stream_id)
    DO UPDATE SET version = excluded.version, digest = s.digest # excluded.digest;
    RETURN NULL;
END $$;

CREATE TRIGGER kafold_event_added AFTER INSERT ON kafold_event
    REFERENCING NEW TABLE AS added FOR EACH STATEMENT EXECUTE FUNCTION kafold_event_added();

-- Only `kafold index rebuild` and `kafold positions reset` may, which set kafold.index_rebuild for their transaction.
CREATE FUNCTION kafold_index_kept() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF COALESCE(current_setting('kafold.index_rebuild', true), '') <> 'on' THEN
        RAISE EXCEPTION '% is a copy of the log and is not changed by hand; to feed it again from the log: kafold index rebuild',
            TG_TABLE_NAME USING ERRCODE = 'restrict_violation';
    END IF;
    RETURN CASE WHEN TG_LEVEL = 'STATEMENT' THEN NULL ELSE NEW END;
END $$;

CREATE TRIGGER kafold_event_kept BEFORE UPDATE OR DELETE OR TRUNCATE ON kafold_event
    FOR EACH STATEMENT EXECUTE FUNCTION kafold_index_kept();
CREATE TRIGGER kafold_stream_kept BEFORE DELETE OR TRUNCATE ON kafold_stream
    FOR EACH STATEMENT EXECUTE FUNCTION kafold_index_kept();
CREATE TRIGGER kafold_stream_kept_update BEFORE UPDATE ON kafold_stream
    FOR EACH ROW WHEN (NEW.version <= OLD.version) EXECUTE FUNCTION kafold_index_kept();
CREATE TRIGGER kafold_partition_kept BEFORE DELETE OR TRUNCATE ON kafold_partition
    FOR EACH STATEMENT EXECUTE FUNCTION kafold_index_kept();
CREATE TRIGGER kafold_partition_kept_update BEFORE UPDATE ON kafold_partition
    FOR EACH ROW WHEN (NEW.next_offset <= OLD.next_offset) EXECUTE FUNCTION kafold_index_kept();

-- A snapshot that was changed is as good as none.
TRUNCATE kafold_snapshot;
ALTER TABLE kafold_snapshot ADD COLUMN checksum BIGINT NOT NULL; -- of everything in the row but saved_at
