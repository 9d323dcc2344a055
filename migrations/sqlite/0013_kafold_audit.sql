-- Written by: every act of control over projections, in the transaction of the act; `kafold audit prune` removes old rows.
-- Read by: people, status commands, `kafold audit verify`.
ALTER TABLE kafold_audit ADD COLUMN previous_hash BLOB; -- the hash of the row before
ALTER TABLE kafold_audit ADD COLUMN hash BLOB;          -- SHA-256 of previous_hash and the row; NULL only until this migration is through
