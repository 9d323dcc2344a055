-- Written by: each process of the service, every 5 s, and by others once it has been silent for a day.
-- Read by: status and doctor.
CREATE TABLE kafold_node (
    id          TEXT PRIMARY KEY,  -- a UUID of the process
    name        TEXT NOT NULL,
    seen_at     INTEGER NOT NULL,  -- the newest report: seconds since 1970
    unready_at  INTEGER,           -- when the node ceased to be ready, if it is not ready
    reasons     TEXT NOT NULL      -- why the node is not ready: a JSON array of sentences
) STRICT;
