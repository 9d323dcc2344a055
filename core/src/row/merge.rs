//! Rows that are added up: two rows of one key become one.

use chrono::{DateTime, NaiveDate, Utc};

use super::{ColumnValue, Row};

/// A row that can be merged with another row of its key.
///
/// `#[derive(Row)]` implements it for a row whose columns, but the key, all have `#[row(sum)]`, `#[row(min)]` or
/// `#[row(max)]`. Such rows give the same result in any order and in any grouping. Implement it by hand for
/// another row, with the same property.
#[diagnostic::on_unimplemented(
    message = "rows of `{Self}` cannot be merged",
    note = "add #[row(sum)], #[row(min)] or #[row(max)] to each field but the key, or implement `kafold::row::Merge`"
)]
pub trait Merge: Row {
    /// Returns one row with the contents of both, which have the same key.
    #[must_use]
    fn merge(self, other: Self) -> Self;
}

/// The part of a column in [`Merge::merge`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MergeRole {
    /// The sum of both values.
    Sum,
    /// The smaller value.
    Min,
    /// The larger value.
    Max,
}

impl std::fmt::Display for MergeRole {
    /// Writes a name stored in the fingerprints of read models.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Sum => "sum",
            Self::Min => "min",
            Self::Max => "max",
        })
    }
}

/// The type of a column with `#[row(sum)]`: an integer.
#[diagnostic::on_unimplemented(
    message = "a column of `{Self}` cannot be summed",
    label = "no integer",
    note = "#[row(sum)] is for i64, i32, i16, u32, u16 and u8; a sum of f64 depends on the order of its \
            parts: count in integers of a small unit, such as cents"
)]
pub trait Summable: ColumnValue {
    /// Returns the sum; `None` if the type cannot hold the sum.
    fn sum(self, other: Self) -> Option<Self>;
}

/// The type of a column with `#[row(min)]` or `#[row(max)]`: a type that both databases order as Rust does.
#[diagnostic::on_unimplemented(
    message = "a column of `{Self}` has no least and no greatest value",
    label = "not ordered alike in all databases",
    note = "#[row(min)] and #[row(max)] are for integers, f64, String, NaiveDate and DateTime<Utc>, and \
            Options of them"
)]
pub trait Ordered: ColumnValue {
    /// Returns the smaller value. A present value is preferred to an absent one.
    #[must_use]
    fn least(self, other: Self) -> Self;

    /// Returns the larger value. A present value is preferred to an absent one.
    #[must_use]
    fn greatest(self, other: Self) -> Self;
}

macro_rules! summable {
    ($($type:ty),*) => {$(
        impl Summable for $type {
            fn sum(self, other: Self) -> Option<Self> {
                self.checked_add(other)
            }
        }
    )*};
}
summable!(i64, i32, i16, u32, u16, u8);

macro_rules! ordered {
    ($($type:ty),*) => {$(
        impl Ordered for $type {
            fn least(self, other: Self) -> Self {
                if other < self { other } else { self }
            }

            fn greatest(self, other: Self) -> Self {
                if other > self { other } else { self }
            }
        }
    )*};
}
ordered!(i64, i32, i16, u32, u16, u8, f64, String, NaiveDate, DateTime<Utc>);

impl<T: Ordered> Ordered for Option<T> {
    fn least(self, other: Self) -> Self {
        match (self, other) {
            (Some(one), Some(other)) => Some(one.least(other)),
            (one, other) => one.or(other),
        }
    }

    fn greatest(self, other: Self) -> Self {
        match (self, other) {
            (Some(one), Some(other)) => Some(one.greatest(other)),
            (one, other) => one.or(other),
        }
    }
}
