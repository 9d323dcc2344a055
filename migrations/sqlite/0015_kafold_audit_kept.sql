-- Written by: this migration; a prune drops these triggers and makes them again from this file, in its transaction.
-- Read by: SQLite, at every change of kafold_audit. REPLACE removes a row without a trigger on DELETE: the one on INSERT refuses it.
CREATE TRIGGER kafold_audit_kept_insert BEFORE INSERT ON kafold_audit
WHEN EXISTS (SELECT 1 FROM kafold_audit WHERE id = NEW.id) BEGIN
    SELECT RAISE(ABORT, 'REPLACE of kafold_audit is refused: the record is append-only; old acts are removed by `kafold audit prune --older-than DAYS --reason TEXT`');
END;
CREATE TRIGGER kafold_audit_kept_update BEFORE UPDATE ON kafold_audit WHEN OLD.hash IS NOT NULL BEGIN
    SELECT RAISE(ABORT, 'UPDATE of kafold_audit is refused: the record is append-only; old acts are removed by `kafold audit prune --older-than DAYS --reason TEXT`');
END;
CREATE TRIGGER kafold_audit_kept_delete BEFORE DELETE ON kafold_audit BEGIN
    SELECT RAISE(ABORT, 'DELETE of kafold_audit is refused: the record is append-only; old acts are removed by `kafold audit prune --older-than DAYS --reason TEXT`');
END;
