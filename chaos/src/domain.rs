//! The domain of the campaign: a tally that grows up to a limit and can be closed.
//!
//! Small on purpose: whether a refusal was true can be told from the version alone, a commit holds
//! one event or several, and one of the two read models has rows that all partitions share.

use kafold::projections::ReadModel;
use kafold::{Aggregate, DomainEvent, Recorded, Row};
use serde::{Deserialize, Serialize};

/// What a tally reaches at most.
pub const TOTAL_MAX: u64 = 1_000;
/// Rows of the shared read model.
pub const GROUPS: u64 = 8;

/// Stored as written: renaming a variant or a field changes what old events decode to.
#[derive(Debug, Clone, PartialEq, Eq, DomainEvent, Serialize, Deserialize)]
#[event(category = Tally::CATEGORY)]
pub enum TallyEvent {
    /// The tally grew.
    #[event("tally.added", version = 1)]
    Added {
        /// The row of the shared read model.
        group: u64,
        /// By how much.
        amount: u64,
    },
    /// Nothing can be added any more.
    #[event("tally.closed", version = 1)]
    Closed {
        /// The row of the shared read model.
        group: u64,
    },
}

/// What may be asked of a tally.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TallyCommand {
    /// One event for each amount, all in one commit.
    Add {
        /// The row of the shared read model.
        group: u64,
        /// One or several.
        amounts: Vec<u64>,
    },
    /// No more after this.
    Close {
        /// The row of the shared read model.
        group: u64,
    },
}

impl TallyCommand {
    /// How many events it makes.
    pub fn events(&self) -> u64 {
        match self {
            Self::Add { amounts, .. } => amounts.len() as u64,
            Self::Close { .. } => 1,
        }
    }
}

/// Why a tally refuses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
pub enum TallyError {
    /// It would grow beyond [`TOTAL_MAX`].
    #[error("full")]
    Full,
    /// It is closed.
    #[error("closed")]
    Closed,
}

/// A tally's state.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tally {
    total: u64,
    closed: bool,
}

impl Aggregate for Tally {
    const CATEGORY: &'static str = "tally";
    type Command = TallyCommand;
    type Event = TallyEvent;
    type Error = TallyError;

    fn decide(&self, command: &TallyCommand) -> Result<Vec<TallyEvent>, TallyError> {
        match command {
            _ if self.closed => Err(TallyError::Closed),
            TallyCommand::Add { amounts, .. }
                if self.total + amounts.iter().sum::<u64>() > TOTAL_MAX =>
            {
                Err(TallyError::Full)
            }
            TallyCommand::Add { group, amounts } => {
                let added = |amount: &u64| TallyEvent::Added { group: *group, amount: *amount };
                Ok(amounts.iter().map(added).collect())
            }
            TallyCommand::Close { group } => Ok(vec![TallyEvent::Closed { group: *group }]),
        }
    }

    fn evolve(&mut self, event: &TallyEvent) {
        match event {
            TallyEvent::Added { amount, .. } => self.total += amount,
            TallyEvent::Closed { .. } => self.closed = true,
        }
    }
}

/// A row for each tally: local to its partition.
#[derive(Debug, Clone, PartialEq, Row)]
pub struct TallyRow {
    #[row(stream)]
    id: String,
    total: i64,
    version: i64,
    closed: i64,
}

impl ReadModel for TallyRow {
    const NAME: &'static str = "tallies";
    type Event = TallyEvent;

    fn fold(id: &String, row: Option<Self>, event: &Recorded<TallyEvent>) -> Option<Self> {
        let new = || Self { id: id.clone(), total: 0, version: 0, closed: 0 };
        let mut row = row.unwrap_or_else(new);
        match event.event {
            // Bounded by TOTAL_MAX.
            TallyEvent::Added { amount, .. } => row.total += amount as i64,
            TallyEvent::Closed { .. } => row.closed += 1,
        }
        // Added up rather than copied: an event that is applied twice or left out shows.
        row.version += 1;
        Some(row)
    }
}

/// A row for each group of tallies, whatever their partitions.
#[derive(Debug, Clone, PartialEq, Row)]
pub struct GroupRow {
    #[row(key)]
    id: String,
    total: i64,
    events: i64,
    closed: i64,
}

impl ReadModel for GroupRow {
    const NAME: &'static str = "groups";
    type Event = TallyEvent;

    fn keys(event: &Recorded<TallyEvent>) -> Vec<String> {
        let (TallyEvent::Added { group, .. } | TallyEvent::Closed { group }) = event.event;
        vec![group.to_string()]
    }

    fn fold(id: &String, row: Option<Self>, event: &Recorded<TallyEvent>) -> Option<Self> {
        let new = || Self { id: id.clone(), total: 0, events: 0, closed: 0 };
        let mut row = row.unwrap_or_else(new);
        match event.event {
            TallyEvent::Added { amount, .. } => row.total += amount as i64,
            TallyEvent::Closed { .. } => row.closed += 1,
        }
        row.events += 1;
        Some(row)
    }
}
