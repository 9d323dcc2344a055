//! The projection on whose behalf a task runs.
//!
//! A worker marks the work of each transaction of a projection. A command from within such a
//! transaction might wait for the very transaction, so the command handler refuses it; and a writer of
//! a SQLite file names the projection that keeps the others waiting.

use std::cell::RefCell;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::Arc;

thread_local! {
    static CURRENT: RefCell<Option<Arc<str>>> = const { RefCell::new(None) };
}

/// Runs the work on behalf of a projection. Tasks that the work spawns are not of the projection.
pub async fn on_behalf_of<T>(projection: &Arc<str>, work: impl Future<Output = T>) -> T {
    let mut work = pin!(work);
    poll_fn(|context| {
        let _entered = Entered::enter(Arc::clone(projection));
        work.as_mut().poll(context)
    })
    .await
}

/// Returns the name of the projection on whose behalf the caller runs.
pub fn current() -> Option<Arc<str>> {
    CURRENT.with_borrow(Clone::clone)
}

/// Restores what was current before, after a panic too.
struct Entered(Option<Arc<str>>);

impl Entered {
    fn enter(projection: Arc<str>) -> Self {
        Self(CURRENT.replace(Some(projection)))
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        CURRENT.set(self.0.take());
    }
}

#[cfg(test)]
mod tests {
    use std::task::{Context, Poll, Waker};

    use super::*;

    #[test]
    fn a_projection_is_current_while_its_work_is_polled_only() {
        let names = [Arc::from("sales"), Arc::from("stock")];
        let step = |polls: &mut u32| {
            *polls += 1;
            if *polls < 3 { Poll::Pending } else { Poll::Ready(current()) }
        };
        let work = |polls: &mut u32| {
            let mut polls = std::mem::take(polls);
            poll_fn(move |_| step(&mut polls))
        };
        let mut one = pin!(on_behalf_of(&names[0], on_behalf_of(&names[1], work(&mut 0))));
        let mut other = pin!(on_behalf_of(&names[0], work(&mut 0)));
        let mut context = Context::from_waker(Waker::noop());
        for _ in 0..2 {
            assert!(one.as_mut().poll(&mut context).is_pending());
            assert!(other.as_mut().poll(&mut context).is_pending());
            assert_eq!(current(), None);
        }
        let named = |name: &str| Poll::Ready(Some(Arc::from(name)));
        assert_eq!(one.as_mut().poll(&mut context), named("stock"));
        assert_eq!(other.as_mut().poll(&mut context), named("sales"));
        let panicked = std::panic::catch_unwind(|| {
            let mut work = pin!(on_behalf_of(&names[0], poll_fn::<(), _>(|_| panic!("a fold"))));
            let _ = work.as_mut().poll(&mut Context::from_waker(Waker::noop()));
        });
        assert!(panicked.is_err());
        assert_eq!(current(), None);
    }
}
