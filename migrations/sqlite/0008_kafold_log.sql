-- Written by: this migration, once: the identity of the log that kafold_event is, when the embedded store uses this file.
-- Read by: the embedded store; every cursor of a reader carries it, so that another or a recreated file is noticed.
CREATE TABLE kafold_log (
    singleton  INTEGER PRIMARY KEY CHECK (singleton = 1),
    log_id     TEXT NOT NULL,              -- 32 hexadecimal digits, random
    created_at INTEGER NOT NULL
) STRICT;

INSERT INTO kafold_log (singleton, log_id, created_at)
VALUES (1, lower(hex(randomblob(16))), unixepoch() * 1000000);
