-- Written by: this migration, once.
-- Read by: every load of a stream. The head of a stream is its last event: a table of heads cost as much as the events.
DROP TRIGGER kafold_event_added ON kafold_event;
DROP FUNCTION kafold_event_added();
DROP TABLE kafold_stream;

-- The index begins anew: events that are there have no digest of their stream. The owner of each partition feeds it again
-- from the log.
SET LOCAL kafold.index_rebuild = 'on';
TRUNCATE kafold_event, kafold_partition;

-- One B-tree finds a stream, its head, and the heads of all streams with near hashes.
ALTER TABLE kafold_event
    ADD COLUMN stream_digest BIGINT NOT NULL, -- XOR of the digests of the stream's events up to this one
    DROP CONSTRAINT kafold_event_pkey,
    ADD PRIMARY KEY (partition, hash, category, stream_id, version) INCLUDE (stream_digest);
