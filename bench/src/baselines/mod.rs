//! What somebody would write by hand instead, as carefully as ours: the same bytes, headers,
//! partitions and settings of the client.

pub mod consumer;
pub mod producer;
pub mod server;
pub mod sqlite_log;
pub mod upsert;
