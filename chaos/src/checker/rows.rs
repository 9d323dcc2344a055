//! Read models against the fold of the log up to their checkpoints.

use std::collections::BTreeMap;

use super::Verdict;
use super::log::{Accepted, Event, Log, Said};
use crate::history::{Line, RowsLine};

type Rows = BTreeMap<String, BTreeMap<String, i64>>;

/// The fold of one read model, which only goes forward.
#[derive(Default)]
struct Model {
    /// How many accepted events of each partition are in it.
    applied: BTreeMap<u32, usize>,
    checkpoint: BTreeMap<u32, u64>,
    rows: Rows,
}

pub(super) fn check(lines: &[Line], log: &Log, verdict: &mut Verdict) {
    let mut models: BTreeMap<&str, Model> = BTreeMap::new();
    for line in lines {
        if let Line::Rows(shown) = line {
            verdict.rows += 1;
            models.entry(&shown.model).or_default().check(shown, log, verdict);
        }
    }
}

impl Model {
    fn check(&mut self, shown: &RowsLine, log: &Log, verdict: &mut Verdict) {
        let RowsLine { model, at, .. } = shown;
        for (partition, next) in &shown.checkpoint {
            let before = self.checkpoint.insert(*partition, *next).unwrap_or_default();
            let place = format!("{model}, partition {partition} at {next}, {at} µs");
            if *next < before {
                return verdict.found("checkpoint-backward", format!("{place}: was at {before}"));
            }
            if *next > log.ends.get(partition).copied().unwrap_or_default() {
                return verdict.found("checkpoint-ahead", format!("{place}: behind the log's end"));
            }
            let accepted = log.partitions.get(partition).map_or(&[][..], Vec::as_slice);
            let applied = self.applied.entry(*partition).or_default();
            let mut whole = true;
            for Accepted { offset, stream, index } in &accepted[*applied..] {
                if offset >= next {
                    break;
                }
                let event = &log.streams[stream][*index];
                apply(model, stream, event, &mut self.rows);
                whole = event.is_last;
                *applied += 1;
            }
            if !whole {
                verdict.found("checkpoint-torn", format!("{place}: inside a commit"));
            }
        }
        if self.rows != shown.rows {
            let differs = |key: &&String| self.rows.get(*key) != shown.rows.get(*key);
            let key = self.rows.keys().chain(shown.rows.keys()).find(differs);
            let (folded, shown) =
                key.map_or((None, None), |key| (self.rows.get(key), shown.rows.get(key)));
            let detail = format!(
                "{model} at {at} µs, row {key:?}: the log says {folded:?}, shown {shown:?}"
            );
            verdict.found("rows-differ", detail);
        }
    }
}

fn apply(model: &str, stream: &str, event: &Event, rows: &mut Rows) {
    let (group, amount, closed) = match event.said {
        Said::Added { group, amount } => (group, amount, 0),
        Said::Closed { group } => (group, 0, 1),
    };
    let (key, counted) = match model {
        "groups" => (group.to_string(), "events"),
        _ => (stream.split_once('-').map_or(stream, |(_, id)| id).to_owned(), "version"),
    };
    let row = rows.entry(key).or_default();
    for (column, more) in [("total", amount as i64), (counted, 1), ("closed", closed)] {
        *row.entry(column.to_owned()).or_default() += more;
    }
}
