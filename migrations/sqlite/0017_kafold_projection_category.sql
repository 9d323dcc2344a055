-- Written by: the worker of a read model whose events declare no category.
-- Read by: the same. An event type that the model does not have is of another aggregate in a category which the model
-- passes by, and of a newer program in a category which the model reads.
CREATE TABLE kafold_projection_category (
    projection  TEXT NOT NULL,
    generation  INTEGER NOT NULL,
    category    TEXT NOT NULL,
    is_read     INTEGER NOT NULL,
    PRIMARY KEY (projection, generation, category)
) STRICT, WITHOUT ROWID;
