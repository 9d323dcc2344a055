-- Written by: every act of control over projections, in the transaction of the act; rows are only added.
-- Read by: people and status commands.
CREATE TABLE kafold_audit (
    id         BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at         TIMESTAMPTZ NOT NULL,
    actor      TEXT NOT NULL,              -- who asked: a person, a node
    action     TEXT NOT NULL,              -- such as pause, rebuild, skip
    projection TEXT,
    details    TEXT                        -- JSON
);

CREATE INDEX kafold_audit_projection ON kafold_audit (projection, id);
