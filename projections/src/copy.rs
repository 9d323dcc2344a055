//! Rows into PostgreSQL by COPY in its binary format.

use sqlx::encode::IsNull;
use sqlx::postgres::{PgArgumentBuffer, PgCopyIn};
use sqlx::{Encode, PgConnection, Postgres};

/// Bytes of rows that are sent at a time.
const PART_BYTES: usize = 1 << 17;
/// Least bytes of the last part, more than any segment has.
///
/// Behind it only a few bytes tell the end, and sqlx 0.9.0 leaves Nagle's algorithm on
/// (transact-rs/sqlx#4335): they stay back until the server has acknowledged the part, which a part of
/// less than a segment is only 40 ms later.
const LAST_BYTES_MIN: usize = 1 << 16;
/// PostgreSQL's manual, COPY, binary format: signature, no flags, an extension of no bytes.
const HEADER: [u8; 19] = *b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0";
/// Where the header tells the length of its extension, which the server skips.
const EXTENSION: std::ops::Range<usize> = 15..19;
const END: [u8; 2] = (-1_i16).to_be_bytes();
/// The length of NULL.
const NULL: [u8; 4] = (-1_i32).to_be_bytes();

/// A COPY under way.
pub(crate) struct CopyRows<'c> {
    copy: PgCopyIn<&'c mut PgConnection>,
    buffer: PgArgumentBuffer,
    width: i16,
}

impl<'c> CopyRows<'c> {
    /// Begins the statement, whose rows have so many columns.
    pub(crate) async fn begin(
        connection: &'c mut PgConnection,
        sql: &str,
        width: i16,
    ) -> Result<Self, sqlx::Error> {
        let copy = connection.copy_in_raw(sql).await?;
        let mut buffer = PgArgumentBuffer::default();
        buffer.extend(HEADER);
        Ok(Self { copy, buffer, width })
    }

    /// Begins a row; its fields follow in the order of the columns.
    pub(crate) async fn row(&mut self) -> Result<(), sqlx::Error> {
        if self.buffer.len() >= PART_BYTES + LAST_BYTES_MIN {
            self.copy.send(&self.buffer[..PART_BYTES]).await?;
            self.buffer.drain(..PART_BYTES);
        }
        self.buffer.extend(self.width.to_be_bytes());
        Ok(())
    }

    /// Adds one field; the value's type must be the column's.
    pub(crate) fn field<'v>(
        &mut self,
        value: impl Encode<'v, Postgres>,
    ) -> Result<(), sqlx::Error> {
        let begin = self.buffer.len();
        self.buffer.extend(NULL);
        if let IsNull::Yes = value.encode(&mut self.buffer).map_err(sqlx::Error::Encode)? {
            return Ok(());
        }
        let bytes = self.buffer.len() - begin - NULL.len();
        let length = i32::try_from(bytes).map_err(|error| sqlx::Error::Encode(error.into()))?;
        self.buffer[begin..begin + NULL.len()].copy_from_slice(&length.to_be_bytes());
        Ok(())
    }

    /// Ends it: now PostgreSQL tells what is wrong with any of the rows.
    pub(crate) async fn finish(mut self) -> Result<(), sqlx::Error> {
        self.buffer.extend(END);
        lengthen(&mut self.buffer);
        self.copy.send(self.buffer.as_slice()).await?;
        self.copy.finish().await.map(drop)
    }

    /// Gives it up; the transaction can only be rolled back.
    pub(crate) async fn abort(self) -> Result<(), sqlx::Error> {
        self.copy.abort("given up").await
    }
}

/// Makes a COPY long enough that is nothing but its last part: by the header's extension.
fn lengthen(copy: &mut Vec<u8>) {
    let Some(missing @ 1..) = LAST_BYTES_MIN.checked_sub(copy.len()) else { return };
    copy[EXTENSION].copy_from_slice(&(missing as u32).to_be_bytes());
    copy.splice(EXTENSION.end..EXTENSION.end, std::iter::repeat_n(0, missing));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_copy_is_made_long_enough_and_a_long_one_stays() {
        let mut short = [&HEADER[..], b"rows"].concat();
        lengthen(&mut short);
        assert_eq!(short.len(), LAST_BYTES_MIN);
        assert_eq!(short[..15], HEADER[..15]);
        let extension = u32::from_be_bytes(short[EXTENSION].try_into().expect("four bytes"));
        assert_eq!(short[EXTENSION.end + extension as usize..], *b"rows");
        let mut long = vec![7; LAST_BYTES_MIN];
        lengthen(&mut long);
        assert_eq!(long, [7; LAST_BYTES_MIN]);
    }
}
