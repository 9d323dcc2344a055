-- Written by: the worker of a windowed model, in the transaction that writes the rows of the model.
-- Read by: the same, and queries that say which windows are closed.
ALTER TABLE kafold_checkpoint ADD COLUMN clock INTEGER;               -- event time of the partition
ALTER TABLE kafold_checkpoint ADD COLUMN newest_at INTEGER;           -- time of the event recorded last
ALTER TABLE kafold_checkpoint ADD COLUMN newest_recorded_at INTEGER;  -- when that event was recorded
ALTER TABLE kafold_checkpoint ADD COLUMN in_windows INTEGER NOT NULL DEFAULT 0;    -- events in at least one window
ALTER TABLE kafold_checkpoint ADD COLUMN late INTEGER NOT NULL DEFAULT 0;          -- events late for all of their windows
ALTER TABLE kafold_checkpoint ADD COLUMN late_windows INTEGER NOT NULL DEFAULT 0;  -- windows for which events were late
ALTER TABLE kafold_checkpoint ADD COLUMN future INTEGER NOT NULL DEFAULT 0;        -- events stamped ahead of their recording
ALTER TABLE kafold_checkpoint ADD COLUMN keyless INTEGER NOT NULL DEFAULT 0;       -- events that touch no row
ALTER TABLE kafold_checkpoint ADD COLUMN late_rows INTEGER NOT NULL DEFAULT 0;     -- rows of kafold_late_event, without their limit
ALTER TABLE kafold_projection ADD COLUMN live_window TEXT;                -- JSON; the windows of the live generation
ALTER TABLE kafold_projection ADD COLUMN partitions INTEGER;              -- partitions of the log, of a windowed model
