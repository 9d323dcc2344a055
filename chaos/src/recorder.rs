//! Keeps the history, in memory and in a file.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use kafold::Clock;
use kafold::clock::SystemClock;

use crate::history::{FaultLine, Line, Micros};

/// The one clock and the one book of a campaign.
pub struct Recorder {
    begun: Instant,
    book: Mutex<Book>,
}

struct Book {
    lines: Vec<Line>,
    file: BufWriter<File>,
    failed: Option<std::io::Error>,
}

impl Recorder {
    /// Begins a history in this file.
    pub fn create(path: &Path) -> std::io::Result<Self> {
        let file = BufWriter::new(File::create(path)?);
        let book = Mutex::new(Book { lines: Vec::new(), file, failed: None });
        Ok(Self { begun: SystemClock.instant(), book })
    }

    /// Since the campaign began.
    pub fn now(&self) -> Micros {
        u64::try_from((SystemClock.instant() - self.begun).as_micros()).unwrap_or(u64::MAX)
    }

    /// Adds a line.
    pub fn add(&self, line: Line) {
        let mut book = self.book();
        let written = serde_json::to_writer(&mut book.file, &line)
            .map_err(std::io::Error::from)
            .and_then(|()| book.file.write_all(b"\n"));
        book.failed = book.failed.take().or(written.err());
        book.lines.push(line);
    }

    /// Adds a fault, or its end, and shows it.
    #[expect(clippy::print_stdout, reason = "the campaign's own output")]
    pub fn fault(&self, kind: &str, what: impl Into<String>) {
        let (at, what) = (self.now(), what.into());
        println!("{:>8.1} s  {kind:<22} {what}", at as f64 / 1e6);
        self.add(Line::Fault(FaultLine { at, kind: kind.to_owned(), what }));
    }

    /// All lines until now.
    pub fn lines(&self) -> Vec<Line> {
        self.book().lines.clone()
    }

    /// Everything is in the file.
    pub fn flush(&self) -> std::io::Result<()> {
        let mut book = self.book();
        match book.failed.take() {
            Some(error) => Err(error),
            None => book.file.flush(),
        }
    }

    fn book(&self) -> std::sync::MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
