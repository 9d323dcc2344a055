//! The bounded cache of what is known of streams.

use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lru::LruCache;

use super::slot::Slot;
use crate::aggregate::Aggregate;
use crate::ids::StreamId;

/// A slot under its lock, which knows no poison: a slot is left consistent by a panic, because
/// whatever is being changed is not in it meanwhile.
pub(super) type SharedSlot<A> = Arc<futures_util::lock::Mutex<Slot<A>>>;

/// Slots by stream, the ones not used for longest given up first. A slot given up while commands
/// are on their way in it does no harm: it lives on until they are done, and a new one of the same
/// stream starts from what is in the log.
pub(super) struct HotStates<A: Aggregate> {
    slots: Mutex<LruCache<StreamId, SharedSlot<A>>>,
}

impl<A: Aggregate> HotStates<A> {
    pub(super) fn new(hot_states_max: usize) -> Self {
        let limit = NonZeroUsize::new(hot_states_max).unwrap_or(NonZeroUsize::MIN);
        Self { slots: Mutex::new(LruCache::new(limit)) }
    }

    pub(super) fn slot(&self, stream: &StreamId) -> SharedSlot<A> {
        Arc::clone(self.slots().get_or_insert_ref(stream, SharedSlot::default))
    }

    pub(super) fn len(&self) -> usize {
        self.slots().len()
    }

    fn slots(&self) -> MutexGuard<'_, LruCache<StreamId, SharedSlot<A>>> {
        // Nothing of an aggregate runs under this lock.
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
