//! What a projection is called and how its table looks: names that are valid on both databases, and
//! the fingerprint that tells one definition from another.

use kafold_core::row::{Column, ColumnKind, ColumnRole, Row};
use kafold_core::window::Window;
use kafold_migrations::Identifier;

use crate::read_model::ReadModel;
use crate::windowed::{Place, WindowRow, Windowed};

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
    /// The windows of a windowed model.
    pub(crate) window: Option<Window>,
    /// The name of the time of a windowed model.
    pub(crate) timeline: Option<&'static str>,
    /// `true` if each partition has rows of its own, which the view merges.
    pub(crate) is_spread: bool,
}

impl Definition {
    pub(crate) fn of_projection(name: &str, version: u32, tables: &[&str]) -> Self {
        let fingerprint = format!("projection v{version}: {}", tables.join(", "));
        let tables = tables.iter().map(|&table| table.to_owned()).collect();
        let name = name.to_owned();
        Self {
            name,
            fingerprint,
            columns: None,
            tables,
            window: None,
            timeline: None,
            is_spread: false,
        }
    }

    pub(crate) fn of_model<M: ReadModel>() -> Self {
        const {
            if let Some(mistake) = mistake(M::NAME, M::COLUMNS) {
                panic!("{}", mistake);
            }
        }
        let columns = M::COLUMNS;
        let shown: Vec<String> = columns.iter().map(show_column).collect();
        Self {
            name: M::NAME.to_owned(),
            fingerprint: format!("v{}: {}", M::VERSION, shown.join(", ")),
            columns: Some(columns),
            tables: vec![M::NAME.to_owned()],
            window: None,
            timeline: None,
            is_spread: false,
        }
    }

    /// The definition of a windowed model with these windows.
    pub(crate) fn of_windows<M: Windowed>(window: &Window) -> Self {
        const {
            if let Some(mistake) = mistake(M::NAME, M::COLUMNS) {
                panic!("{}", mistake);
            }
            if let Some(mistake) = window_mistake(M::COLUMNS, M::PLACE) {
                panic!("{}", mistake);
            }
        }
        let columns = WindowRow::<M>::COLUMNS;
        let shown: Vec<String> = columns.iter().map(show_column).collect();
        let (place, timeline) = (M::PLACE.text(), M::TIMELINE);
        let windows = format!("{window}, {place}, timeline {timeline}");
        Self {
            name: M::NAME.to_owned(),
            fingerprint: format!("windowed v{}, {windows}: {}", M::VERSION, shown.join(", ")),
            columns: Some(columns),
            tables: vec![M::NAME.to_owned()],
            window: Some(*window),
            timeline: Some(M::TIMELINE),
            is_spread: M::PLACE == Place::Spread,
        }
    }

    /// Returns the stored form of the windows.
    pub(crate) fn window_json(&self) -> Option<String> {
        self.window.map(|window| serde_json::to_string(&window).expect("numbers are JSON"))
    }

    /// The names of [`Definition::check`]ed tables.
    pub(crate) fn tables(&self) -> impl Iterator<Item = Identifier> {
        self.tables.iter().map(|name| Identifier::new(name).expect("the definition was checked"))
    }

    /// Rejects names that a database would quote or cut. Those of a read model are checked by the compiler.
    pub(crate) fn check(&self) -> Result<(), String> {
        match [&self.name].into_iter().chain(&self.tables).find(|name| !is_name(name)) {
            Some(bad) => Err(format!(
                "{bad:?} cannot be the name of a projection or its table: [a-z][a-z0-9_]*, at most \
                 {NAME_CHARS_MAX} characters, and not beginning with kafold_"
            )),
            None => Ok(()),
        }
    }
}

const fn is_name(name: &str) -> bool {
    let is_ours =
        matches!(name.as_bytes(), [b'_', ..] | [b'k', b'a', b'f', b'o', b'l', b'd', b'_', ..]);
    !is_ours && name.len() <= NAME_CHARS_MAX && Identifier::is_valid(name)
}

/// Returns the first mistake in a read model. Runs in the compiler, so that such a model does not compile.
const fn mistake(name: &str, columns: &[Column]) -> Option<&'static str> {
    if !is_name(name) {
        return Some(
            "NAME of a read model: [a-z][a-z0-9_]*, at most 50 characters, and not beginning with kafold_",
        );
    }
    let (mut left, mut keys) = (columns, 0);
    while let [column, rest @ ..] = left {
        if !Identifier::is_valid(column.name) {
            return Some(
                "a column of a read model is named [a-z_][a-z0-9_]*, at most 63 characters",
            );
        }
        let is_json = matches!(column.kind, ColumnKind::Json);
        match column.role {
            ColumnRole::Key if column.nullable || is_json => {
                return Some("the key of a read model may be neither absent nor JSON");
            }
            ColumnRole::Key => keys += 1,
            ColumnRole::Index if is_json => {
                return Some("rows of a read model cannot be found by a JSON column");
            }
            ColumnRole::Index | ColumnRole::Plain => {}
        }
        left = rest;
    }
    if keys > 0 { None } else { Some("a row of a read model has a key") }
}

/// Returns the first mistake in the columns of a windowed model, in the compiler.
const fn window_mistake(columns: &[Column], place: Place) -> Option<&'static str> {
    let mut left = columns;
    while let [column, rest @ ..] = left {
        if is_equal(column.name, "window_start") || is_equal(column.name, "window_end") {
            return Some(
                "the columns window_start and window_end of a windowed model are the toolkit's own",
            );
        }
        let is_value = !matches!(column.role, ColumnRole::Key);
        if is_value && column.merge.is_none() && matches!(place, Place::Spread) {
            return Some(
                "a model with Place::Spread adds its rows up: each field but the key has #[row(sum)], #[row(min)] or \
                 #[row(max)]",
            );
        }
        left = rest;
    }
    None
}

const fn is_equal(one: &str, other: &str) -> bool {
    let (mut one, mut other) = (one.as_bytes(), other.as_bytes());
    while let ([a, rest_of_one @ ..], [b, rest_of_other @ ..]) = (one, other) {
        if *a != *b {
            return false;
        }
        (one, other) = (rest_of_one, rest_of_other);
    }
    one.is_empty() && other.is_empty()
}

fn show_column(column: &Column) -> String {
    let nullable = if column.nullable { "?" } else { "" };
    let role = match column.role {
        ColumnRole::Key => " key",
        ColumnRole::Index => " index",
        ColumnRole::Plain => "",
    };
    let merge = column.merge.map(|merge| format!(" {merge}")).unwrap_or_default();
    format!("{} {}{nullable}{role}{merge}", column.name, column.kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: Column = Column {
        name: "id",
        kind: ColumnKind::Text,
        nullable: false,
        role: ColumnRole::Key,
        merge: None,
    };

    fn check(name: &str, columns: &[Column]) -> bool {
        mistake(name, columns).is_none()
    }

    #[test]
    fn names_that_a_database_would_cut_or_quote_are_refused() {
        assert!(check("sales_by_day", &[KEY]));
        assert!(check(&"x".repeat(50), &[KEY]));
        for bad in ["", "Sales", "1sales", "a-b", "a\"b", "kafold_event", &"x".repeat(51)] {
            assert!(!check(bad, &[KEY]), "{bad:?}");
        }
    }

    #[test]
    fn a_row_needs_a_key_that_is_always_there() {
        const NULLABLE: Column = Column { nullable: true, ..KEY };
        const BAD_NAME: Column = Column { name: "a b", role: ColumnRole::Plain, ..KEY };
        assert!(check("sales", &[KEY]));
        assert!(!check("sales", &[]));
        assert!(check("sales", &[KEY, Column { name: "day", ..KEY }]));
        assert!(!check("sales", &[NULLABLE]));
        assert!(!check("sales", &[KEY, BAD_NAME]));
    }
}
