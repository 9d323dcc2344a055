-- Written by: a worker that runs the projection, a few times a minute.
-- Read by: status and doctor: a projection that no worker runs stands still.
ALTER TABLE kafold_projection ADD COLUMN seen_at INTEGER;  -- seconds since 1970
-- A worker of the version before reports nothing: 45 s from now only those that report count.
UPDATE kafold_projection SET seen_at = unixepoch();
