-- Written by: whoever writes kafold_audit, in the same transaction; its one row is locked meanwhile, so that the chain never forks.
-- Read by: whoever writes kafold_audit, `kafold audit verify`.
CREATE TABLE kafold_audit_head (
    singleton   INTEGER PRIMARY KEY CHECK (singleton = 1),
    pruned_id   BIGINT NOT NULL,           -- the newest row that a prune has removed, 0 if none: the chain begins behind it
    pruned_hash BYTEA NOT NULL,            -- its hash; 32 zero bytes if none
    row_count   BIGINT NOT NULL,           -- rows of kafold_audit
    newest_id   BIGINT NOT NULL,
    newest_hash BYTEA NOT NULL
);

INSERT INTO kafold_audit_head (singleton, pruned_id, pruned_hash, row_count, newest_id, newest_hash)
VALUES (1, 0, decode(repeat('00', 32), 'hex'), 0, 0, decode(repeat('00', 32), 'hex'));

CREATE FUNCTION kafold_audit_head_kept() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '% of kafold_audit_head is refused: it says where the record of acts ends; old acts are removed by '
        '`kafold audit prune --older-than DAYS --reason TEXT`', TG_OP;
END
$$;

CREATE TRIGGER kafold_audit_head_kept BEFORE DELETE OR TRUNCATE ON kafold_audit_head
    FOR EACH STATEMENT EXECUTE FUNCTION kafold_audit_head_kept();
