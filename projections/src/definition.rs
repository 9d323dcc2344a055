//! What a projection is called and how its table looks: names that are valid on both databases, and
//! the fingerprint that tells one definition from another.

use kafold_core::row::{Column, ColumnKind, ColumnRole, Row};
use kafold_migrations::Identifier;

use crate::read_model::ReadModel;

/// Longest name of a projection: its table gets a suffix, and PostgreSQL cuts names at 63.
pub const NAME_CHARS_MAX: usize = 50;

/// The name, and for a read model the table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Definition {
    pub(crate) name: String,
    /// Readable on purpose: a refusal shows what differs.
    pub(crate) fingerprint: String,
    /// Of a read model; a projection makes its own tables.
    pub(crate) columns: Option<&'static [Column]>,
    /// What queries read, by the plain names.
    pub(crate) tables: Vec<String>,
}

impl Definition {
    pub(crate) fn of_projection(name: &str, version: u32, tables: &[&str]) -> Self {
        let fingerprint = format!("projection v{version}: {}", tables.join(", "));
        let tables = tables.iter().map(|&table| table.to_owned()).collect();
        Self { name: name.to_owned(), fingerprint, columns: None, tables }
    }

    pub(crate) fn of_model<M: ReadModel>() -> Self {
        let columns = <M::Row as Row>::COLUMNS;
        let shown: Vec<String> = columns.iter().map(show_column).collect();
        Self {
            name: M::NAME.to_owned(),
            fingerprint: format!("v{}: {}", M::VERSION, shown.join(", ")),
            columns: Some(columns),
            tables: vec![M::NAME.to_owned()],
        }
    }

    /// The names of [`Definition::check`]ed tables.
    pub(crate) fn tables(&self) -> impl Iterator<Item = Identifier> {
        self.tables.iter().map(|name| Identifier::new(name).expect("the definition was checked"))
    }

    /// The first thing about it that no database would take.
    pub(crate) fn check(&self) -> Result<(), String> {
        let name = &self.name;
        if let Some(bad) = [name].into_iter().chain(&self.tables).find(|name| !is_name(name)) {
            return Err(format!(
                "{bad:?} cannot be the name of a projection or its table: [a-z][a-z0-9_]*, at most \
                 {NAME_CHARS_MAX} characters, and not beginning with kafold_"
            ));
        }
        let columns = self.columns.unwrap_or_default();
        if let Some(bad) = columns.iter().find_map(|column| Identifier::new(column.name).err()) {
            return Err(format!("{name}: {bad}"));
        }
        let is_json_index = |c: &&Column| c.kind == ColumnKind::Json && c.role == ColumnRole::Index;
        if let Some(bad) = columns.iter().find(is_json_index) {
            return Err(format!("{name}: rows cannot be found by {}, which is JSON", bad.name));
        }
        let keys: Vec<_> = columns.iter().filter(|c| c.role == ColumnRole::Key).collect();
        match (self.columns, keys.as_slice()) {
            (None, _) => Ok(()),
            (Some(_), [key]) if key.nullable || key.kind == ColumnKind::Json => {
                Err(format!("{name}: the key {} may be neither absent nor JSON", key.name))
            }
            (Some(_), [_]) => Ok(()),
            (Some(_), keys) => Err(format!("{name}: a row has one key, this one {}", keys.len())),
        }
    }
}

fn is_name(name: &str) -> bool {
    let is_ours = name.starts_with("kafold_") || name.starts_with('_');
    !is_ours && name.len() <= NAME_CHARS_MAX && Identifier::new(name).is_ok()
}

fn show_column(column: &Column) -> String {
    let nullable = if column.nullable { "?" } else { "" };
    let role = match column.role {
        ColumnRole::Key => " key",
        ColumnRole::Index => " index",
        ColumnRole::Plain => "",
    };
    format!("{} {}{nullable}{role}", column.name, column.kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: Column =
        Column { name: "id", kind: ColumnKind::Text, nullable: false, role: ColumnRole::Key };

    fn check(name: &str, columns: Option<&'static [Column]>) -> bool {
        let fingerprint = String::new();
        let tables = vec![name.to_owned()];
        Definition { name: name.to_owned(), fingerprint, columns, tables }.check().is_ok()
    }

    #[test]
    fn names_that_a_database_would_cut_or_quote_are_refused() {
        assert!(check("sales_by_day", None));
        assert!(check(&"x".repeat(50), None));
        for bad in ["", "Sales", "1sales", "a-b", "a\"b", "kafold_event", &"x".repeat(51)] {
            assert!(!check(bad, None), "{bad:?}");
        }
    }

    #[test]
    fn a_row_needs_one_key_that_is_always_there() {
        const NULLABLE: Column = Column { nullable: true, ..KEY };
        const BAD_NAME: Column = Column { name: "a b", role: ColumnRole::Plain, ..KEY };
        assert!(check("sales", Some(&[KEY])));
        assert!(!check("sales", Some(&[])));
        assert!(!check("sales", Some(&[KEY, KEY])));
        assert!(!check("sales", Some(&[NULLABLE])));
        assert!(!check("sales", Some(&[KEY, BAD_NAME])));
    }
}
