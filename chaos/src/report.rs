//! What a campaign came to, for people.

use std::collections::{BTreeMap, HashMap};

use uuid::Uuid;

use crate::checker::Verdict;
use crate::history::{Answer, CommandLine, Line, Micros};

/// Anomalies that are shown; the history has them all.
const ANOMALIES_SHOWN_MAX: usize = 20;

/// Prints it.
#[expect(clippy::print_stdout, reason = "the campaign's own output")]
pub fn print(verdict: &Verdict, lines: &[Line]) {
    let faults: u64 =
        verdict.faults.iter().filter(|(kind, _)| is_fault(kind)).map(|(_, times)| times).sum();
    println!("\nfaults             {faults}");
    for (kind, times) in verdict.faults.iter().filter(|(kind, _)| is_fault(kind)) {
        println!("  {kind:<24} {times}");
    }
    println!("commands by answer {:?}", verdict.answers);
    println!("unknown outcomes   {:?}", verdict.settled);
    let settled = settlement(lines);
    println!("  until settled    {}", spread(settled, "ms"));
    let (reads, confirmed) = verdict.reads;
    println!("reads              {reads}, proven to be the newest: {confirmed}");
    println!("read models        {} snapshots", verdict.rows);
    let (events, commits, claims) = (verdict.events, verdict.commits, verdict.claims);
    println!("log                {events} events in {commits} commits, {claims} claims");
    println!("  void records     {:?}", verdict.voids);
    println!(
        "failover: from a fault to the first command begun after it, in the slowest partition"
    );
    for (kind, times) in failovers(lines) {
        println!("  {kind:<24} {}", spread(times, "ms"));
    }
    println!("anomalies          {}", verdict.anomalies.len());
    for anomaly in verdict.anomalies.iter().take(ANOMALIES_SHOWN_MAX) {
        println!("  {anomaly}");
    }
}

fn is_fault(kind: &str) -> bool {
    !matches!(kind, "mended" | "healing" | "healed")
}

fn spread(mut numbers: Vec<u64>, unit: &str) -> String {
    numbers.sort_unstable();
    let Some(last) = numbers.len().checked_sub(1) else { return "never".to_owned() };
    let at = |percent: usize| numbers[last * percent / 100];
    let (p50, p90, most) = (at(50), at(90), at(100));
    format!("{} times, p50 {p50} {unit}, p90 {p90} {unit}, most {most} {unit}", last + 1)
}

/// From the first unknown answer of a command to the answer that settled it, in milliseconds.
fn settlement(lines: &[Line]) -> Vec<u64> {
    let mut open: HashMap<Uuid, Micros> = HashMap::new();
    let mut times = Vec::new();
    for line in lines {
        let Line::Command(CommandLine { command, ended, answer, .. }) = line else { continue };
        match answer {
            Answer::Unknown(_) => {
                open.entry(*command).or_insert(*ended);
            }
            Answer::Appended { .. } | Answer::Rejected(_) | Answer::Conflict { .. } => {
                times.extend(open.remove(command).map(|since| ended.saturating_sub(since) / 1_000));
            }
            Answer::Failed(_) => {}
        }
    }
    times
}

/// How long each kind of fault was felt where it was felt most, in milliseconds.
fn failovers(lines: &[Line]) -> BTreeMap<&str, Vec<u64>> {
    let mut acknowledged: BTreeMap<u32, Vec<(Micros, Micros)>> = BTreeMap::new();
    for line in lines {
        if let Line::Command(CommandLine {
            begun,
            ended,
            answer: Answer::Appended { at, .. },
            ..
        }) = line
        {
            acknowledged.entry(at.partition).or_default().push((*begun, *ended));
        }
    }
    for times in acknowledged.values_mut() {
        times.sort_unstable();
        // From each on, the earliest end.
        let mut earliest = Micros::MAX;
        for (_, ended) in times.iter_mut().rev() {
            earliest = earliest.min(*ended);
            *ended = earliest;
        }
    }
    let mut felt: BTreeMap<&str, Vec<u64>> = BTreeMap::new();
    for line in lines {
        let Line::Fault(fault) = line else { continue };
        let kind = fault.kind.as_str();
        if !is_fault(kind) {
            continue;
        }
        let first = |times: &Vec<(Micros, Micros)>| {
            let after = times.partition_point(|(begun, _)| *begun < fault.at);
            times.get(after).map(|(_, ended)| ended.saturating_sub(fault.at) / 1_000)
        };
        felt.entry(kind).or_default().extend(acknowledged.values().filter_map(first).max());
    }
    felt
}
