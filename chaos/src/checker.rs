//! Is a history one that the promises allow? In time linear in its length, but for sorting.
//!
//! Nothing here is shared with the store under test: the log is folded by the rule that the README
//! gives to foreign consumers, the domain's rules are told anew.

mod log;
mod operations;
mod rows;

use std::collections::BTreeMap;
use std::fmt;

use crate::history::Line;
use log::Log;
pub use log::Voids;

/// Every kind of anomaly that a history alone can show. For each there is a history made by hand in
/// `histories/`, which the checker must flag.
pub const ANOMALIES: [&str; 24] = [
    "acknowledged-lost",
    "checkpoint-ahead",
    "checkpoint-backward",
    "checkpoint-torn",
    "command-twice",
    "commit-mixed",
    "commit-torn",
    "expectation-broken",
    "failed-but-present",
    "false-conflict",
    "false-rejection",
    "log-broken",
    "offset-hole",
    "order-reversed",
    "read-ahead",
    "read-not-prefix",
    "read-stale",
    "read-torn",
    "refused-though-applied",
    "rows-differ",
    "told-otherwise",
    "unasked",
    "version-gap",
    "wrong-stream",
];

/// A broken promise.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Anomaly {
    /// Its kind.
    pub name: &'static str,
    /// What contradicts what.
    pub detail: String,
}

impl fmt::Display for Anomaly {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.name, self.detail)
    }
}

/// What was found wrong, and how much was looked at.
#[derive(Debug, Default)]
pub struct Verdict {
    /// None in a history that keeps every promise.
    pub anomalies: Vec<Anomaly>,
    /// Attempts of commands, by answer.
    pub answers: BTreeMap<&'static str, u64>,
    /// Commands of which an attempt had an unknown outcome, by what they came to.
    pub settled: BTreeMap<&'static str, u64>,
    /// Reads, and those of them that were proven to be the newest.
    pub reads: (u64, u64),
    /// Snapshots of read models.
    pub rows: u64,
    /// Faults, by kind.
    pub faults: BTreeMap<String, u64>,
    /// Accepted events and commits.
    pub events: u64,
    /// Accepted commits.
    pub commits: u64,
    /// Accepted claims.
    pub claims: u64,
    /// Records that never count, by reason.
    pub voids: Voids,
}

impl Verdict {
    fn found(&mut self, name: &'static str, detail: impl Into<String>) {
        debug_assert!(ANOMALIES.contains(&name), "{name} has no history");
        self.anomalies.push(Anomaly { name, detail: detail.into() });
    }
}

/// Checks a whole history.
pub fn check(lines: &[Line]) -> Verdict {
    let mut verdict = Verdict::default();
    let log = Log::fold(lines, &mut verdict);
    operations::check(lines, &log, &mut verdict);
    rows::check(lines, &log, &mut verdict);
    for line in lines {
        if let Line::Fault(fault) = line {
            *verdict.faults.entry(fault.kind.clone()).or_default() += 1;
        }
    }
    verdict
}

#[cfg(test)]
mod tests;
