//! The limits of the store.

use std::time::Duration;

/// How much the store takes at once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EmbeddedConfig {
    /// Submissions that may wait for their turn; one more is
    /// [`Unavailable`](kafold_core::AppendError::Unavailable). Default 8192.
    pub queue_submissions_max: usize,
    /// Most submissions in one transaction: bounds how long the first waits for the last. Default
    /// 1024.
    pub group_submissions_max: usize,
    /// Bytes of events at which a transaction takes no further submission. Default 8 MiB.
    pub group_bytes_max: usize,
    /// Longest event, counted as stream, type, metadata and payload; a longer one is
    /// [`TooLarge`](kafold_core::AppendError::TooLarge). Default 1 MiB less 8 KiB: what Kafka takes
    /// with its headers, so that a service can move there.
    pub event_bytes_max: usize,
}

impl Default for EmbeddedConfig {
    fn default() -> Self {
        Self {
            queue_submissions_max: 8192,
            group_submissions_max: 1024,
            group_bytes_max: 8 << 20,
            event_bytes_max: (1 << 20) - (8 << 10),
        }
    }
}

/// Streams whose last submission is remembered, for commits that build on a pending one. Of a
/// stream beyond them such a commit is answered `NotAppended`, and the command is decided again.
pub(crate) const TICKETS_MAX: usize = 32_768;

/// Events that one query of a stream reads.
pub(crate) const READ_PAGE_EVENTS: i64 = 500;

/// Most reads of one page, when the log grows before the page is compared.
pub(crate) const COMPARISONS_MAX: u32 = 10;

/// How often a waiting reader looks for commits of other processes; commits of this process wake it
/// at once.
pub(crate) const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// How often a store that cannot write tries to, and when a caller should.
pub(crate) const RETRY_AFTER: Duration = Duration::from_secs(1);
