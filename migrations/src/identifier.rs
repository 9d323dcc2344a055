//! Names of tables and columns, and SQL that is made at run time.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use sqlx::{AssertSqlSafe, SqlSafeStr, SqlStr};

/// Longest identifier, in bytes: PostgreSQL cuts longer ones silently.
pub const IDENTIFIER_BYTES_MAX: usize = 63;

/// A name in SQL, `[a-z_][a-z0-9_]{0,62}`: nothing in it needs escaping. Shown in double quotes, so
/// that a keyword is a name too.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Identifier(Arc<str>);

/// A text that is not an [`Identifier`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} cannot name a table or column: it must be [a-z_][a-z0-9_]*, at most {IDENTIFIER_BYTES_MAX} bytes"
)]
pub struct InvalidIdentifier(String);

impl Identifier {
    /// The identifier with this text.
    pub fn new(text: &str) -> Result<Self, InvalidIdentifier> {
        if Self::is_valid(text) {
            return Ok(Self(text.into()));
        }
        Err(InvalidIdentifier(text.chars().take(IDENTIFIER_BYTES_MAX + 1).collect()))
    }

    /// Returns whether the text is an identifier, also in the compiler.
    pub const fn is_valid(text: &str) -> bool {
        let mut left = text.as_bytes();
        if !matches!(left, [b'a'..=b'z' | b'_', ..]) || left.len() > IDENTIFIER_BYTES_MAX {
            return false;
        }
        while let [first, rest @ ..] = left {
            if !matches!(first, b'a'..=b'z' | b'0'..=b'9' | b'_') {
                return false;
            }
            left = rest;
        }
        true
    }

    /// The name without quotes.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Identifier {
    type Err = InvalidIdentifier;

    fn from_str(text: &str) -> Result<Self, InvalidIdentifier> {
        Self::new(text)
    }
}

impl fmt::Display for Identifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{}\"", self.0)
    }
}

/// SQL made at run time, out of nothing but constant text, [`Identifier`]s and numbers: a value can
/// never get into it, values are bound.
///
/// ```
/// # use kafold_migrations::{Identifier, SqlText};
/// let table = Identifier::new("order_summary__g2").unwrap();
/// let mut sql = SqlText::new("DELETE FROM ");
/// sql.name(&table).text(" WHERE day = ").placeholder(1);
/// assert_eq!(sql.finish().as_str(), r#"DELETE FROM "order_summary__g2" WHERE day = $1"#);
/// ```
#[derive(Debug, Clone, Default)]
pub struct SqlText(String);

impl SqlText {
    /// Begins with a constant text.
    pub fn new(text: &'static str) -> Self {
        Self(text.to_owned())
    }

    /// Adds a constant text.
    pub fn text(&mut self, text: &'static str) -> &mut Self {
        self.0.push_str(text);
        self
    }

    /// Adds a name, in quotes.
    pub fn name(&mut self, name: &Identifier) -> &mut Self {
        self.push(format_args!("{name}"))
    }

    /// Adds a name as a text, in single quotes.
    pub fn quoted(&mut self, name: &Identifier) -> &mut Self {
        self.push(format_args!("'{}'", name.as_str()))
    }

    /// Adds a whole number.
    pub fn number(&mut self, number: u64) -> &mut Self {
        self.push(format_args!("{number}"))
    }

    /// Adds the place of the `nth` bound value, from 1: `$1` on both databases.
    pub fn placeholder(&mut self, nth: usize) -> &mut Self {
        self.push(format_args!("${nth}"))
    }

    /// Adds each item by `add`, with `separator` between them.
    pub fn list<T>(
        &mut self,
        separator: &'static str,
        items: impl IntoIterator<Item = T>,
        mut add: impl FnMut(&mut Self, T),
    ) -> &mut Self {
        for (index, item) in items.into_iter().enumerate() {
            if index > 0 {
                self.text(separator);
            }
            add(self, item);
        }
        self
    }

    /// The statement; clones of it share the text.
    pub fn finish(&self) -> SqlStr {
        // Safe by construction: every part came through one of the methods above.
        AssertSqlSafe(Arc::<str>::from(self.0.as_str())).into_sql_str()
    }

    fn push(&mut self, part: fmt::Arguments<'_>) -> &mut Self {
        fmt::Write::write_fmt(&mut self.0, part).expect("a String takes any text");
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_names_are_identifiers() {
        for good in ["a", "_", "order", "sales_by_day__g2", &"x".repeat(63)] {
            assert_eq!(
                Identifier::new(good).map(|name| name.to_string()),
                Ok(format!("\"{good}\""))
            );
        }
        for bad in ["", "1a", "A", "a-b", "a b", "a\"b", "é", "a;", "a.b", &"x".repeat(64)] {
            assert!(Identifier::new(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_list_is_separated_and_not_ended() {
        let mut sql = SqlText::new("VALUES (");
        sql.list(", ", 1..=3, |sql, nth| {
            sql.placeholder(nth);
        })
        .text(") LIMIT ")
        .number(7);
        assert_eq!(sql.finish().as_str(), "VALUES ($1, $2, $3) LIMIT 7");
    }
}
