//! Sources that misbehave.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use kafold_core::memory::MemoryStore;
use kafold_core::store::{Cursor, ReadError, SourceMessage, Subscription};
use kafold_core::{EventSource, Offset, Partition, StreamId};

/// A source whose readers do not share partitions with those of other names: as a worker that has
/// been superseded in its group and has not noticed.
pub(crate) struct Alone {
    pub(crate) store: MemoryStore,
    pub(crate) name: &'static str,
}

#[async_trait]
impl EventSource for Alone {
    async fn subscribe(
        &self,
        name: &str,
        database: Option<&str>,
        batch_events_max: usize,
    ) -> Result<Box<dyn Subscription>, ReadError> {
        self.store.subscribe(&format!("{name}/{}", self.name), database, batch_events_max).await
    }

    fn partitions(&self) -> u32 {
        self.store.partitions()
    }

    fn partition_of(&self, stream: &StreamId) -> Partition {
        self.store.partition_of(stream)
    }

    async fn end_of(&self, partition: Partition) -> Result<Offset, ReadError> {
        self.store.end_of(partition).await
    }
}

/// A source that can be switched off.
pub(crate) struct Switched {
    pub(crate) store: MemoryStore,
    pub(crate) is_off: Arc<AtomicBool>,
}

#[async_trait]
impl EventSource for Switched {
    async fn subscribe(
        &self,
        name: &str,
        database: Option<&str>,
        batch_events_max: usize,
    ) -> Result<Box<dyn Subscription>, ReadError> {
        let inner = self.store.subscribe(name, database, batch_events_max).await?;
        Ok(Box::new(SwitchedSubscription { inner, is_off: self.is_off.clone() }))
    }

    fn partitions(&self) -> u32 {
        self.store.partitions()
    }

    fn partition_of(&self, stream: &StreamId) -> Partition {
        self.store.partition_of(stream)
    }

    async fn end_of(&self, partition: Partition) -> Result<Offset, ReadError> {
        self.store.end_of(partition).await
    }
}

struct SwitchedSubscription {
    inner: Box<dyn Subscription>,
    is_off: Arc<AtomicBool>,
}

#[async_trait]
impl Subscription for SwitchedSubscription {
    async fn next(&mut self) -> Result<SourceMessage, ReadError> {
        if self.is_off.load(Ordering::SeqCst) {
            return Err(ReadError::unavailable(Duration::from_millis(20), "switched off"));
        }
        self.inner.next().await
    }

    async fn start(&mut self, partition: Partition, from: Option<Cursor>) -> Result<(), ReadError> {
        self.inner.start(partition, from).await
    }

    fn stop(&mut self, partition: Partition) {
        self.inner.stop(partition);
    }
}

/// A source that panics at its first `left` subscriptions.
pub(crate) struct Panicking {
    pub(crate) store: MemoryStore,
    pub(crate) left: AtomicU32,
}

#[async_trait]
impl EventSource for Panicking {
    async fn subscribe(
        &self,
        name: &str,
        database: Option<&str>,
        batch_events_max: usize,
    ) -> Result<Box<dyn Subscription>, ReadError> {
        let left =
            self.left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
        assert!(left.is_err(), "a driver with a defect");
        self.store.subscribe(name, database, batch_events_max).await
    }

    fn partitions(&self) -> u32 {
        self.store.partitions()
    }

    fn partition_of(&self, stream: &StreamId) -> Partition {
        self.store.partition_of(stream)
    }

    async fn end_of(&self, partition: Partition) -> Result<Offset, ReadError> {
        self.store.end_of(partition).await
    }
}
