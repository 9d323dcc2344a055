//! How far a long read has come: a bar on a terminal, nothing elsewhere.

use std::io::IsTerminal;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::output::printable;

/// Counts records on standard error; gone when it is dropped.
pub(crate) struct Progress(ProgressBar);

impl Progress {
    /// Of so many records of what is being read.
    pub(crate) fn new(records: u64, what: &str) -> Self {
        let bar = match std::io::stderr().is_terminal() {
            true => ProgressBar::new(records),
            false => ProgressBar::with_draw_target(Some(records), ProgressDrawTarget::hidden()),
        };
        let template = "reading {msg} {bar:30} {human_pos}/{human_len} records, {eta} left";
        bar.set_style(ProgressStyle::with_template(template).expect("the template is a constant"));
        bar.set_message(printable(what).into_owned());
        Self(bar)
    }

    /// So many records are read, of so many.
    pub(crate) fn at(&self, done: u64, total: u64) {
        self.0.set_length(total);
        self.0.set_position(done);
    }

    pub(crate) fn advance(&self, records: u64) {
        self.0.inc(records);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
