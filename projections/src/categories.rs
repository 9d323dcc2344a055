//! The categories whose events a read model reads, learned from the log for an enum of events that
//! declares none.
//!
//! A category is read when an event of it has a type of the enum, and passed by when an event of it
//! has another type. Both together are a fault: the enum misses a type, or two aggregates use one
//! name. The table `kafold_projection_category` keeps the categories, so that restarts, other workers
//! and the size of batches make no difference.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use kafold_core::RecordedEvent;
use kafold_core::store::Batch;

use crate::generation::Generation;
use crate::handler::{ApplyError, Fault, Target};
use crate::sql::either;
use crate::transaction::Transaction;

/// One category in a batch, read or passed by. A category of both kinds has two sightings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Sighting {
    /// The place of the first event in its batch.
    first: usize,
    is_read: bool,
}

/// The categories in a batch. A batch has few, so they are searched one by one.
#[derive(Debug, Default)]
pub(crate) struct Sightings(Vec<Sighting>);

impl Sightings {
    /// Adds the event at a place of the batch.
    pub(crate) fn add(&mut self, batch: &Batch, place: usize, is_read: bool) {
        let category = |place: usize| batch.events[place].stream.category();
        let is_known =
            |known: &Sighting| known.is_read == is_read && category(known.first) == category(place);
        if !self.0.iter().any(is_known) {
            self.0.push(Sighting { first: place, is_read });
        }
    }

    /// Returns the first event of each category, and whether the model reads the category.
    pub(crate) fn events<'b>(
        &'b self,
        batch: &'b Batch,
    ) -> impl Iterator<Item = (&'b RecordedEvent, bool)> {
        self.0.iter().map(|sighting| (&batch.events[sighting.first], sighting.is_read))
    }
}

/// The categories of each generation that are known to be stored.
#[derive(Debug, Default)]
pub(crate) struct StoredCategories(Mutex<HashMap<Generation, HashMap<String, bool>>>);

impl StoredCategories {
    /// Stores the categories of a round, in its transaction. Rejects a round which contradicts a stored
    /// category.
    pub(crate) async fn store<E>(
        &self,
        target: Target<'_>,
        tx: &mut Transaction<'_>,
        sightings: &[(&RecordedEvent, bool)],
    ) -> Result<(), ApplyError> {
        if self.check::<E>(target.generation, sightings)? {
            return Ok(());
        }
        self.load(target, tx).await?;
        if self.check::<E>(target.generation, sightings)? {
            return Ok(());
        }
        let sql = "INSERT INTO kafold_projection_category (projection, generation, category, is_read) \
                   VALUES ($1, $2, $3, $4) ON CONFLICT DO NOTHING";
        for (event, is_read) in sightings {
            let category = event.stream.category();
            either!(tx, connection => {
                let query = sqlx::query(sql).bind(target.name).bind(target.generation.int());
                query.bind(category).bind(is_read).execute(&mut **connection).await?;
            });
        }
        // The worker of another partition may have stored a category in the meantime.
        let stored = read(target, tx).await?;
        check::<E>(&stored, sightings).map(drop).map_err(Into::into)
    }

    /// Returns whether all categories are known to be stored. Rejects a contradiction.
    fn check<E>(
        &self,
        generation: Generation,
        sightings: &[(&RecordedEvent, bool)],
    ) -> Result<bool, Fault> {
        let known = self.lock();
        known.get(&generation).map_or(Ok(false), |known| check::<E>(known, sightings))
    }

    /// Loads the rows which other transactions have committed.
    async fn load(&self, target: Target<'_>, tx: &mut Transaction<'_>) -> Result<(), sqlx::Error> {
        let stored = read(target, tx).await?;
        self.lock().insert(target.generation, stored);
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Generation, HashMap<String, bool>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn read(
    target: Target<'_>,
    tx: &mut Transaction<'_>,
) -> Result<HashMap<String, bool>, sqlx::Error> {
    let sql = "SELECT category, is_read FROM kafold_projection_category \
               WHERE projection = $1 AND generation = $2";
    let rows: Vec<(String, bool)> = either!(tx, connection => {
        let query = sqlx::query_as(sql).bind(target.name).bind(target.generation.int());
        query.fetch_all(&mut **connection).await?
    });
    Ok(rows.into_iter().collect())
}

/// Returns whether all categories are stored. Rejects a sighting that contradicts a stored category.
fn check<E>(
    stored: &HashMap<String, bool>,
    sightings: &[(&RecordedEvent, bool)],
) -> Result<bool, Fault> {
    let mut are_all_stored = true;
    for (event, is_read) in sightings {
        let category = event.stream.category();
        match stored.get(category) {
            Some(stored) if stored != is_read => return Err(mixed::<E>(event, *is_read)),
            Some(_) => {}
            None => are_all_stored = false,
        }
        let is_other = |(other, read): &(&String, &bool)| **read && *other != category;
        if *is_read && let Some((other, _)) = stored.iter().find(is_other) {
            return Err(in_two_categories::<E>(event, other));
        }
    }
    Ok(are_all_stored)
}

/// An event of a category that has events of the enum and others.
fn mixed<E>(event: &RecordedEvent, is_read: bool) -> Fault {
    let (category, events) = (event.stream.category(), std::any::type_name::<E>());
    let reason = match is_read {
        false => format!(
            "{events} has other events of the category {category}, but not this type: a newer program \
             wrote it (deploy it), or name it in #[event(ignore(…))]"
        ),
        true => format!(
            "events of the category {category} were left out before, since {events} has no such types: \
             declare #[event(category = {category:?})] on it, and rebuild the projection"
        ),
    };
    Fault { parks: false, ..Fault::at(event, reason) }
}

fn in_two_categories<E>(event: &RecordedEvent, other: &str) -> Fault {
    let (category, events) = (event.stream.category(), std::any::type_name::<E>());
    let reason = format!(
        "{events} has event types that occur in two categories, {other} and {category}: declare the \
         category to read, as in #[event(category = {other:?})] on it"
    );
    Fault { parks: false, ..Fault::at(event, reason) }
}
