-- Written by: whoever writes kafold_audit, in the same transaction.
-- Read by: whoever writes kafold_audit, `kafold audit verify`.
CREATE TABLE kafold_audit_head (
    singleton   INTEGER PRIMARY KEY CHECK (singleton = 1),
    pruned_id   INTEGER NOT NULL,          -- the newest row that a prune has removed, 0 if none: the chain begins behind it
    pruned_hash BLOB NOT NULL,             -- its hash; 32 zero bytes if none
    row_count   INTEGER NOT NULL,          -- rows of kafold_audit
    newest_id   INTEGER NOT NULL,
    newest_hash BLOB NOT NULL
) STRICT;

INSERT INTO kafold_audit_head (singleton, pruned_id, pruned_hash, row_count, newest_id, newest_hash)
VALUES (1, 0, zeroblob(32), 0, 0, zeroblob(32));

CREATE TRIGGER kafold_audit_head_kept BEFORE DELETE ON kafold_audit_head BEGIN
    SELECT RAISE(ABORT, 'DELETE of kafold_audit_head is refused: it says where the record of acts ends; old acts are removed by `kafold audit prune --older-than DAYS --reason TEXT`');
END;
