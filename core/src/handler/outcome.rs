//! The outcome of a submission, for everyone who asked for the same command.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::{Context, Poll, Wake, Waker};

use crate::store::{AppendError, Appended, Outcome};

/// Whoever waits drives it, so it is known even when the first caller went away.
///
/// As [`futures_util::future::Shared`], whose ways cost a lone command two changes of thread: it wakes
/// whoever finds the outcome out once more for that, and others with a lock held that they need first.
pub(super) struct SharedOutcome {
    awaited: Arc<Awaited>,
    /// Of this one's waker among those that wait.
    place: Option<usize>,
}

struct Awaited {
    known: OnceLock<Result<Appended, AppendError>>,
    outcome: Mutex<Outcome<Appended>>,
    waiting: Mutex<Vec<Option<Waker>>>,
}

impl SharedOutcome {
    pub(super) fn new(outcome: Outcome<Appended>) -> Self {
        let (known, waiting) = Default::default();
        let awaited = Awaited { known, outcome: Mutex::new(outcome), waiting };
        Self { awaited: Arc::new(awaited), place: None }
    }

    /// The outcome, if it is known by now.
    pub(super) fn known(&self) -> Option<Result<Appended, AppendError>> {
        if self.awaited.known.get().is_none() && self.awaited.find_out() {
            self.awaited.wake_all();
        }
        self.awaited.known.get().cloned()
    }
}

impl Clone for SharedOutcome {
    fn clone(&self) -> Self {
        Self { awaited: Arc::clone(&self.awaited), place: None }
    }
}

impl Future for SharedOutcome {
    type Output = Result<Appended, AppendError>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        if self.awaited.known.get().is_none() {
            // Before the look: what happens behind it wakes.
            let place = self.awaited.wait(self.place, context.waker());
            self.place = Some(place);
            if self.awaited.find_out() {
                self.awaited.leave(place);
                self.awaited.wake_all();
            }
        }
        match self.awaited.known.get() {
            Some(known) => Poll::Ready(known.clone()),
            None => Poll::Pending,
        }
    }
}

impl Drop for SharedOutcome {
    fn drop(&mut self) {
        if let Some(place) = self.place {
            self.awaited.leave(place);
        }
    }
}

impl Awaited {
    /// Asks for the outcome unless it is known; whether this made it known, of which others are to be told.
    fn find_out(self: &Arc<Self>) -> bool {
        let mut outcome = lock(&self.outcome);
        if self.known.get().is_some() {
            return false;
        }
        let waker = Waker::from(Arc::clone(self));
        match outcome.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(result) => self.known.set(result).is_ok(),
            Poll::Pending => false,
        }
    }

    fn wait(&self, place: Option<usize>, waker: &Waker) -> usize {
        let mut waiting = lock(&self.waiting);
        let place = place.unwrap_or_else(|| {
            waiting.push(None);
            waiting.len() - 1
        });
        let before = waiting[place].replace(waker.clone());
        // What is dropped with it may want to leave, too.
        drop(waiting);
        drop(before);
        place
    }

    fn leave(&self, place: usize) {
        let left = lock(&self.waiting).get_mut(place).and_then(Option::take);
        drop(left);
    }

    /// One after the other, so that none needs the lock that is held here.
    fn wake_all(&self) {
        loop {
            let next = lock(&self.waiting).iter_mut().find_map(Option::take);
            let Some(waker) = next else { return };
            waker.wake();
        }
    }
}

impl Wake for Awaited {
    fn wake(self: Arc<Self>) {
        self.wake_all();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.wake_all();
    }
}

/// Whole after a panic elsewhere: an outcome that panicked panics again.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use futures_util::FutureExt;
    use tokio::sync::oneshot;

    use super::*;
    use crate::ids::{Offset, Partition, Position, Version};

    #[derive(Default)]
    struct Task(AtomicUsize);

    impl Wake for Task {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    impl Task {
        fn poll(self: &Arc<Self>, outcome: &mut SharedOutcome) -> bool {
            let waker = Waker::from(Arc::clone(self));
            outcome.poll_unpin(&mut Context::from_waker(&waker)).is_ready()
        }

        fn woken(&self) -> usize {
            self.0.load(Ordering::SeqCst)
        }
    }

    type Answer = oneshot::Sender<Result<Appended, AppendError>>;

    fn pending() -> (Answer, SharedOutcome) {
        let (answer, asked) = oneshot::channel();
        (answer, SharedOutcome::new(asked.map(|known| known.expect("is answered")).boxed()))
    }

    fn appended() -> Appended {
        let position = Position { partition: Partition(0), offset: Offset(7) };
        Appended { version: Version(3), position, duplicate: false }
    }

    fn answer(to: Answer) {
        to.send(Ok(appended())).expect("is waited for");
    }

    #[test]
    fn everyone_who_waits_is_woken_once() {
        let (to, mut first) = pending();
        let (one, other) = (Arc::<Task>::default(), Arc::<Task>::default());
        let mut second = first.clone();
        // Twice: the newest waker counts.
        assert!(!one.poll(&mut first) && !one.poll(&mut first) && !other.poll(&mut second));
        answer(to);
        assert_eq!((one.woken(), other.woken()), (1, 1));
        assert!(one.poll(&mut first) && other.poll(&mut second));
        assert_eq!((one.woken(), other.woken()), (1, 1), "who finds it out is not told so");
    }

    #[test]
    fn who_went_away_or_is_not_asked_any_more_holds_up_nobody() {
        let (to, mut first) = pending();
        let (gone, idle, other) =
            (Arc::<Task>::default(), Arc::<Task>::default(), Arc::<Task>::default());
        let (mut second, mut third) = (first.clone(), first.clone());
        assert!(!gone.poll(&mut first) && !idle.poll(&mut second));
        drop(first);
        assert!(!other.poll(&mut third));
        answer(to);
        assert_eq!((gone.woken(), other.woken()), (0, 1));
        assert!(other.poll(&mut third));
    }

    #[test]
    fn whoever_looks_wakes_those_who_wait() {
        let (answered, asked) = std::sync::mpsc::channel();
        // Its maker wakes nobody.
        let silent = std::future::poll_fn(move |_| match asked.try_recv() {
            Ok(appended) => Poll::Ready(Ok(appended)),
            Err(_) => Poll::Pending,
        });
        let mut outcome = SharedOutcome::new(silent.boxed());
        let task = Arc::<Task>::default();
        assert!(!task.poll(&mut outcome));
        assert!(outcome.known().is_none());
        answered.send(appended()).expect("is asked for");
        assert!(outcome.clone().known().is_some());
        assert_eq!(task.woken(), 1);
        assert!(task.poll(&mut outcome));
    }
}
