//! Rows into PostgreSQL by COPY in its binary format.

use sqlx::encode::IsNull;
use sqlx::postgres::{PgArgumentBuffer, PgCopyIn};
use sqlx::{Encode, PgConnection, Postgres};

/// Bytes of rows that are sent at a time.
const CHUNK_BYTES: usize = 1 << 16;
/// PostgreSQL's manual, COPY, binary format: signature, no flags, no extension.
const HEADER: [u8; 19] = *b"PGCOPY\n\xff\r\n\0\0\0\0\0\0\0\0\0";
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
        if self.buffer.len() >= CHUNK_BYTES {
            self.copy.send(self.buffer.as_slice()).await?;
            self.buffer.clear();
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
        self.copy.send(self.buffer.as_slice()).await?;
        self.copy.finish().await.map(drop)
    }

    /// Gives it up; the transaction can only be rolled back.
    pub(crate) async fn abort(self) -> Result<(), sqlx::Error> {
        self.copy.abort("given up").await
    }
}
