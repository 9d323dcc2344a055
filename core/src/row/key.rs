//! Keys of one or several columns, and their prefixes.

use std::hash::Hash;

use super::{ColumnValue, Value};

/// The key of a row: the value of its key column, or a tuple of the values of its two to four key columns,
/// in the order of the fields.
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot be the key of a row",
    note = "the type of a key column has Eq, Ord and Hash and is never absent: not f64, not an Option",
    note = "a key has at most four columns"
)]
pub trait RowKey: Clone + Eq + Ord + Hash + Send + Sync + 'static {
    /// Number of key columns.
    const COLUMNS: usize;

    /// Returns the key as the database returns it, see [`ColumnValue::normalize`]. The error has the place of
    /// the column among the key columns, and the reason.
    fn normalized(self) -> Result<Self, (usize, String)>;

    /// Appends each value to the values of its column. There are [`COLUMNS`](Self::COLUMNS) lists.
    fn append_to(self, columns: &mut [Vec<Value>]);
}

impl<T: ColumnValue + Clone + Eq + Ord + Hash + Send + Sync + 'static> RowKey for T {
    const COLUMNS: usize = 1;

    fn normalized(self) -> Result<Self, (usize, String)> {
        self.normalize().map_err(|reason| (0, reason))
    }

    fn append_to(self, columns: &mut [Vec<Value>]) {
        columns[0].push(self.into_value());
    }
}

/// The first columns of a key of several columns, as a tuple of values: `(day,)` and `(day, hour)` are
/// prefixes of a key `(day, hour, user)`.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a prefix of the key `{K}`",
    note = "a prefix is a tuple of the first columns of the key, one or more but not all: `(day,)` for `(day, user)`"
)]
pub trait KeyPrefix<K> {
    /// Returns the values, as the columns store them. `None` if no column holds one of the values.
    fn into_values(self) -> Option<Vec<Value>>;
}

macro_rules! tuple_key {
    ($($type:ident $place:tt),*) => {
        impl<$($type: ColumnValue + RowKey),*> RowKey for ($($type,)*) {
            const COLUMNS: usize = [$($place),*].len();

            fn normalized(self) -> Result<Self, (usize, String)> {
                Ok(($(self.$place.normalize().map_err(|reason| ($place, reason))?,)*))
            }

            fn append_to(self, columns: &mut [Vec<Value>]) {
                $(columns[$place].push(self.$place.into_value());)*
            }
        }
    };
}
tuple_key!(A 0, B 1);
tuple_key!(A 0, B 1, C 2);
tuple_key!(A 0, B 1, C 2, D 3);

macro_rules! key_prefix {
    ($($type:ident $value:ident $place:tt),* of $($key:ident),*) => {
        impl<$($key,)* $($value: Into<$type>),*> KeyPrefix<($($key,)*)> for ($($value,)*)
        where
            $($type: ColumnValue,)*
        {
            fn into_values(self) -> Option<Vec<Value>> {
                Some(vec![$(Into::<$type>::into(self.$place).normalize().ok()?.into_value()),*])
            }
        }
    };
}
key_prefix!(A X 0 of A, B);
key_prefix!(A X 0 of A, B, C);
key_prefix!(A X 0, B Y 1 of A, B, C);
key_prefix!(A X 0 of A, B, C, D);
key_prefix!(A X 0, B Y 1 of A, B, C, D);
key_prefix!(A X 0, B Y 1, C Z 2 of A, B, C, D);
