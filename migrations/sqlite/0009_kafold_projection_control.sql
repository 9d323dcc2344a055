-- Written by: whoever controls projections (requests), projection workers (what became of a rebuild).
-- Read by: projection workers, status commands.
ALTER TABLE kafold_projection ADD COLUMN last_generation INTEGER NOT NULL DEFAULT 1;   -- highest ever given out: none is used twice
ALTER TABLE kafold_projection ADD COLUMN next_takes_parked INTEGER NOT NULL DEFAULT 0  -- switch although the next generation has parked streams
    CHECK (next_takes_parked IN (0, 1));
ALTER TABLE kafold_projection ADD COLUMN next_reason TEXT;                             -- why the rebuild waits or stopped, one sentence
ALTER TABLE kafold_projection ADD COLUMN resumptions INTEGER NOT NULL DEFAULT 0;       -- counts requests to go on: a stopped worker waits for the next
