-- live_timeline: written by the worker of a windowed model, with its windows; read by `clock advance`.
-- advance_to: written by `clock advance`; read by the processes that append clock events.
ALTER TABLE kafold_projection ADD COLUMN live_timeline TEXT;
ALTER TABLE kafold_projection ADD COLUMN advance_to INTEGER;
