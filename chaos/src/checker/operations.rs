//! Commands and reads against the final log.

use std::collections::HashMap;

use uuid::Uuid;

use super::Verdict;
use super::log::{Commit, Event, Log, Said};
use crate::domain::{TOTAL_MAX, TallyCommand};
use crate::history::{Answer, CommandLine, Line, Micros, ReadLine};

pub(super) fn check(lines: &[Line], log: &Log, verdict: &mut Verdict) {
    let mut attempts: HashMap<Uuid, Vec<&CommandLine>> = HashMap::new();
    let mut reads: HashMap<&str, Vec<&ReadLine>> = HashMap::new();
    for line in lines {
        match line {
            Line::Command(command) => {
                *verdict.answers.entry(name(&command.answer)).or_default() += 1;
                attempts.entry(command.command).or_default().push(command);
            }
            Line::Read(read) => {
                verdict.reads.0 += 1;
                verdict.reads.1 += u64::from(read.confirmed);
                reads.entry(&read.stream).or_default().push(read);
            }
            Line::Rows(_) | Line::Fault(_) | Line::Record(_) => {}
        }
    }
    for (command, commit) in &log.commits {
        if !attempts.contains_key(command) {
            verdict.found("unasked", format!("{command} at {}", commit.at));
        }
    }
    let mut streams: HashMap<&str, Stream<'_>> = HashMap::new();
    for (command, attempts) in &attempts {
        let commit = log.commits.get(command);
        check_command(*command, attempts, commit, log, verdict);
        let stream = streams.entry(&attempts[0].stream).or_default();
        stream.add(attempts, commit);
        stream.attempts.extend(attempts);
    }
    for id in reads.keys() {
        streams.entry(id).or_default();
    }
    for (id, mut stream) in streams {
        stream.sort();
        let states = states(log.streams.get(id).map_or(&[][..], Vec::as_slice));
        stream.check_order(id, verdict);
        for attempt in &stream.attempts {
            stream.check_answer(attempt, &states, verdict);
        }
        for read in reads.get(id).into_iter().flatten() {
            stream.check_read(read, &states, log, verdict);
        }
    }
}

fn name(answer: &Answer) -> &'static str {
    match answer {
        Answer::Appended { .. } => "appended",
        Answer::Rejected(_) => "rejected",
        Answer::Conflict { .. } => "conflict",
        Answer::Failed(_) => "not appended",
        Answer::Unknown(_) => "unknown",
    }
}

/// All attempts of one command.
fn check_command(
    command: Uuid,
    attempts: &[&CommandLine],
    commit: Option<&Commit>,
    log: &Log,
    verdict: &mut Verdict,
) {
    let mut acknowledged: Option<Micros> = None;
    for attempt in attempts {
        if let Answer::Appended { version, at } = attempt.answer {
            acknowledged =
                Some(acknowledged.map_or(attempt.ended, |first| first.min(attempt.ended)));
            match commit {
                None => verdict.found("acknowledged-lost", format!("{command} at {at}")),
                Some(commit) if (commit.last, commit.at) != (version, at) => {
                    let (last, place) = (commit.last, commit.at);
                    let detail = format!("{command} is {last} at {place}, told {version} at {at}");
                    verdict.found("told-otherwise", detail);
                }
                Some(_) => {}
            }
        }
    }
    for attempt in attempts {
        let refused = matches!(attempt.answer, Answer::Rejected(_) | Answer::Conflict { .. });
        if refused && acknowledged.is_some_and(|first| first < attempt.begun) {
            verdict.found("refused-though-applied", format!("{command}: {:?}", attempt.answer));
        }
    }
    let unknown = attempts.iter().any(|attempt| matches!(attempt.answer, Answer::Unknown(_)));
    if unknown {
        let came_to = match (acknowledged, commit) {
            (Some(_), _) => "acknowledged later",
            (None, Some(_)) => "in the log, never acknowledged",
            (None, None) => "not in the log",
        };
        *verdict.settled.entry(came_to).or_default() += 1;
    }
    let Some(commit) = commit else { return };
    if acknowledged.is_none() && !unknown {
        verdict.found("failed-but-present", format!("{command} at {}", commit.at));
    }
    let asked = attempts[0];
    if commit.stream != asked.stream {
        verdict.found("wrong-stream", format!("{command} at {}", commit.at));
    } else if !log.streams.get(&commit.stream).is_some_and(|events| {
        let (first, last) = (commit.first as usize - 1, commit.last as usize);
        let values = events[first..last].iter().map(|event| event.said);
        values.eq(wanted(&asked.ask))
    }) {
        verdict.found("commit-torn", format!("{command} at {} is not what was asked", commit.at));
    }
    let admitted = attempts
        .iter()
        .any(|attempt| attempt.expected.is_none_or(|expected| expected + 1 == commit.first));
    if !admitted {
        let detail = format!("{command} begins at {}, expected {:?}", commit.first, asked.expected);
        verdict.found("expectation-broken", detail);
    }
}

/// The events of a command.
fn wanted(ask: &TallyCommand) -> Vec<Said> {
    match ask {
        TallyCommand::Add { group, amounts } => {
            let added = |amount: &u64| Said::Added { group: *group, amount: *amount };
            amounts.iter().map(added).collect()
        }
        TallyCommand::Close { group } => vec![Said::Closed { group: *group }],
    }
}

/// What a tally was at a version.
#[derive(Debug, Clone, Copy, Default)]
struct State {
    total: u64,
    closed: bool,
    /// Whether it could be seen: no commit was open there.
    is_whole: bool,
}

/// The states at versions 0, 1, 2 …
fn states(events: &[Event]) -> Vec<State> {
    let mut states = vec![State { is_whole: true, ..State::default() }];
    let mut state = State::default();
    for event in events {
        match event.said {
            Said::Added { amount, .. } => state.total += amount,
            Said::Closed { .. } => state.closed = true,
        }
        state.is_whole = event.is_last;
        states.push(state);
    }
    states
}

/// Why it refuses, if it does.
fn refusal(state: State, ask: &TallyCommand) -> Option<&'static str> {
    match ask {
        _ if state.closed => Some("closed"),
        TallyCommand::Add { amounts, .. } => {
            let sum: u64 = amounts.iter().sum();
            (state.total + sum > TOTAL_MAX).then_some("full")
        }
        TallyCommand::Close { .. } => None,
    }
}

/// When what happened to a stream, to tell which versions it can have had at a moment.
#[derive(Default)]
struct Stream<'h> {
    attempts: Vec<&'h CommandLine>,
    /// When a commit was first acknowledged, and its last version; then the highest until then.
    acknowledged: Vec<(Micros, u64)>,
    /// When a commit was first asked for, and its first version; then the lowest from then on.
    begun: Vec<(Micros, u64)>,
    /// First asked, first acknowledged, last version.
    commits: Vec<(Micros, Option<Micros>, u64)>,
}

impl Stream<'_> {
    fn add(&mut self, attempts: &[&CommandLine], commit: Option<&Commit>) {
        let Some(commit) = commit else { return };
        let acknowledged = attempts
            .iter()
            .filter(|attempt| matches!(attempt.answer, Answer::Appended { .. }))
            .map(|attempt| attempt.ended)
            .min();
        let begun = attempts.iter().map(|attempt| attempt.begun).min().unwrap_or_default();
        self.acknowledged.extend(acknowledged.map(|ended| (ended, commit.last)));
        self.begun.push((begun, commit.first));
        self.commits.push((begun, acknowledged, commit.last));
    }

    fn sort(&mut self) {
        self.acknowledged.sort_unstable();
        let mut highest = 0;
        for (_, version) in &mut self.acknowledged {
            highest = highest.max(*version);
            *version = highest;
        }
        self.begun.sort_unstable();
        let mut lowest = u64::MAX;
        for (_, version) in self.begun.iter_mut().rev() {
            lowest = lowest.min(*version);
            *version = lowest;
        }
        self.commits.sort_unstable_by_key(|commit| commit.2);
    }

    /// The stream had at least this version at the moment.
    fn at_least(&self, moment: Micros) -> u64 {
        let before = self.acknowledged.partition_point(|(ended, _)| *ended < moment);
        before.checked_sub(1).map_or(0, |last| self.acknowledged[last].1)
    }

    /// The stream had at most this version at the moment.
    fn at_most(&self, moment: Micros, end: u64) -> u64 {
        let after = self.begun.partition_point(|(begun, _)| *begun <= moment);
        self.begun.get(after).map_or(end, |(_, first)| first.saturating_sub(1)).min(end)
    }

    /// Who was acknowledged before another one was asked for comes before it.
    fn check_order(&self, id: &str, verdict: &mut Verdict) {
        let mut earliest: Option<(Micros, u64)> = None;
        for (begun, acknowledged, version) in self.commits.iter().rev() {
            if let Some((ended, later)) = earliest
                && ended < *begun
            {
                let detail =
                    format!("{id} {later} was acknowledged before {version} was asked for");
                verdict.found("order-reversed", detail);
            }
            if let Some(ended) = acknowledged
                && earliest.is_none_or(|(earliest, _)| *ended < earliest)
            {
                earliest = Some((*ended, *version));
            }
        }
    }

    fn check_answer(&self, attempt: &CommandLine, states: &[State], verdict: &mut Verdict) {
        let end = states.len() as u64 - 1;
        let window = self.at_least(attempt.begun)..=self.at_most(attempt.ended, end);
        let seen = window.clone().filter_map(|version| {
            states
                .get(version as usize)
                .filter(|state| state.is_whole)
                .map(|state| (version, state))
        });
        let CommandLine { command, stream, expected, .. } = attempt;
        match &attempt.answer {
            Answer::Rejected(reason) => {
                let mut seen = seen;
                let holds = seen.any(|(version, state)| {
                    expected.is_none_or(|expected| expected == version)
                        && refusal(*state, &attempt.ask) == Some(reason)
                });
                if !holds {
                    let detail = format!("{command} of {stream}: not {reason} at {window:?}");
                    verdict.found("false-rejection", detail);
                }
            }
            Answer::Conflict { actual } => {
                let mut seen = seen;
                // Behind the demand it is a conflict for ever, however old the version that it tells.
                let for_ever = expected.is_some_and(|expected| expected < *actual);
                let holds = for_ever && actual <= window.end()
                    || *expected != Some(*actual) && seen.any(|(version, _)| version == *actual);
                if !holds {
                    let detail = format!(
                        "{command} of {stream}: told {actual}, expected {expected:?}, was {window:?}"
                    );
                    verdict.found("false-conflict", detail);
                }
            }
            Answer::Appended { .. } | Answer::Failed(_) | Answer::Unknown(_) => {}
        }
    }

    fn check_read(&self, read: &ReadLine, states: &[State], log: &Log, verdict: &mut Verdict) {
        let ReadLine { stream, begun, ended, events, confirmed, .. } = read;
        let version = events.len() as u64;
        let truth = log.streams.get(stream).map_or(&[][..], Vec::as_slice);
        let is_prefix = events.len() <= truth.len()
            && events.iter().zip(truth).all(|(read, event)| *read == event.at);
        if !is_prefix {
            return verdict.found("read-not-prefix", format!("{stream}: {events:?}"));
        }
        if !states[events.len()].is_whole {
            verdict.found("read-torn", format!("{stream} at {version}, inside a commit"));
        }
        let (least, most) = (self.at_least(*begun), self.at_most(*ended, states.len() as u64 - 1));
        if *confirmed && version < least {
            let detail =
                format!("{stream} confirmed at {version}, {least} was acknowledged before");
            verdict.found("read-stale", detail);
        }
        if version > most {
            let detail = format!("{stream} at {version}, {most} was the most that was asked for");
            verdict.found("read-ahead", detail);
        }
    }
}
