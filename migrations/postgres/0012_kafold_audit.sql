-- Written by: every act of control over projections, in the transaction of the act; `kafold audit prune` removes old rows.
-- Read by: people, status commands, `kafold audit verify`.
ALTER TABLE kafold_audit
    ALTER COLUMN id DROP IDENTITY,         -- counted by kafold_audit_head, without gaps
    ADD COLUMN previous_hash BYTEA,        -- the hash of the row before
    ADD COLUMN hash          BYTEA;        -- SHA-256 of previous_hash and the row; NULL only until this migration is through

CREATE FUNCTION kafold_audit_kept() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'DELETE' THEN
        IF current_setting('kafold.audit_prune', true) = 'on' THEN
            RETURN OLD;
        END IF;
    ELSIF TG_OP = 'UPDATE' THEN
        IF OLD.hash IS NULL THEN
            RETURN NEW;
        END IF;
    END IF;
    RAISE EXCEPTION '% of kafold_audit is refused: the record is append-only; old acts are removed by '
        '`kafold audit prune --older-than DAYS --reason TEXT`', TG_OP;
END
$$;

CREATE TRIGGER kafold_audit_kept BEFORE UPDATE OR DELETE ON kafold_audit
    FOR EACH ROW EXECUTE FUNCTION kafold_audit_kept();
CREATE TRIGGER kafold_audit_kept_whole BEFORE TRUNCATE ON kafold_audit
    FOR EACH STATEMENT EXECUTE FUNCTION kafold_audit_kept();
