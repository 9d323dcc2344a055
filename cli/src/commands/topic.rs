//! `topic create` and `topic check`: the topics of a log on Kafka.

use std::fmt;

use clap::Subcommand;
use kafold::kafka::Operator;
use kafold::kafka::operate::{PartitionFacts, ReadableLog, SettingReport, TopicReport};
use kafold::{Offset, Partition, ReadError};
use serde::Serialize;

use crate::admin::Context;
use crate::error::{Error, chain};
use crate::log::{ask_all, operator};
use crate::output::count;

#[derive(Debug, Clone, Subcommand)]
pub(crate) enum TopicCommand {
    /// Makes the topics that are absent, with settings that keep events for ever.
    ///
    /// ?partitions=N&replication=R in the log's URL say how many partitions (default 12; it can never be
    /// changed) and copies (default 3, or as many as there are brokers) new topics get. What exists is
    /// checked and left as it is.
    Create,
    /// Holds settings and records of the topics against what a log needs; makes nothing.
    Check,
}

#[derive(Serialize)]
struct Made {
    topic: String,
    existed: bool,
}

pub(crate) async fn create(context: &mut Context) -> Result<(), Error> {
    let url = context.options.log()?;
    let made = operator(&url, &context.clock).await?.create_topics().await?;
    let out = &mut context.out;
    if out.json {
        let made = made.into_iter();
        let made: Vec<_> = made.map(|m| Made { topic: m.topic, existed: m.existed }).collect();
        return out.document(&serde_json::json!({ "topics": made }));
    }
    for made in made {
        let what = if made.existed { "existed already" } else { "created" };
        out.line(&format!("{} {what}", made.topic))?;
    }
    Ok(())
}

/// The finding that a topic is not there.
pub(crate) const ABSENT: &str = "topic";

/// One thing that was looked at.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Finding {
    pub(crate) topic: String,
    /// What was looked at, such as `retention.ms` or `records`.
    pub(crate) setting: String,
    /// What was found.
    pub(crate) value: String,
    /// `ok`, `warning` or `unsafe`.
    pub(crate) verdict: Verdict,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) why: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) remedy: Option<String>,
}

impl Finding {
    /// What was found, and why that is wrong.
    pub(crate) fn sentence(&self) -> String {
        let Self { topic, setting, value, .. } = self;
        let why = self.why.as_deref().unwrap_or_default();
        match setting.as_str() {
            ABSENT => format!("{topic}: {why}"),
            _ => format!("{topic} {setting}={value}: {why}"),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Verdict {
    Ok,
    /// Unsafe and accepted by `allow_unsafe`, or costly.
    Warning,
    Unsafe,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ok => "ok",
            Self::Warning => "warning",
            Self::Unsafe => "unsafe",
        })
    }
}

pub(crate) async fn check(context: &mut Context) -> Result<(), Error> {
    let url = context.options.log()?;
    let findings = findings(&operator(&url, &context.clock).await?).await?;
    let unsound = findings.iter().filter(|f| f.verdict == Verdict::Unsafe).count() as u64;
    let out = &mut context.out;
    if out.json {
        out.document(&serde_json::json!({ "safe": unsound == 0, "findings": findings }))?;
    } else {
        let rows: Vec<_> = findings
            .iter()
            .map(|f| [f.topic.clone(), f.setting.clone(), f.value.clone(), f.verdict.to_string()])
            .collect();
        out.table(["TOPIC", "SETTING", "FOUND", "VERDICT"], &rows)?;
        for finding in findings.iter().filter(|f| f.why.is_some()) {
            out.line(&format!("\n{}", finding.sentence()))?;
            out.line(&format!("  {}", finding.remedy.as_deref().unwrap_or_default()))?;
        }
    }
    match unsound {
        0 => Ok(()),
        _ => Err(Error::failed(format!(
            "{} is not safe: {}; see each one's remedy",
            url.shown(),
            count(unsound, "finding")
        ))),
    }
}

/// Everything that there is to say about the log's topics; nothing is made.
pub(crate) async fn findings(operator: &Operator) -> Result<Vec<Finding>, Error> {
    let reports = operator.check_topics().await?;
    let mut findings: Vec<_> = reports.iter().flat_map(of_settings).collect();
    if let (Some(events), Some(log)) = (reports.first(), operator.log().await?) {
        findings.push(of_records(&events.topic, &log).await?);
        findings.extend(of_added(&events.topic, &log).await?);
    }
    Ok(findings)
}

fn of_settings(report: &TopicReport) -> Vec<Finding> {
    if !report.exists {
        return vec![Finding {
            topic: report.topic.clone(),
            setting: ABSENT.into(),
            value: "absent".into(),
            verdict: Verdict::Unsafe,
            why: Some("there is no such topic".into()),
            remedy: Some(
                "make it with `topic create`, or start the service, which does the same".into(),
            ),
        }];
    }
    let finding = |setting: &SettingReport| {
        let found = setting.finding.clone();
        let verdict = match &found {
            None => Verdict::Ok,
            Some(_) if setting.is_accepted => Verdict::Warning,
            Some(_) => Verdict::Unsafe,
        };
        let (why, remedy) = found.map(|found| (found.why, found.remedy)).unzip();
        let (topic, value) = (report.topic.clone(), setting.value.clone());
        Finding { topic, setting: setting.setting.clone(), value, verdict, why, remedy }
    };
    report.settings.iter().map(finding).collect()
}

/// Whether the records are those of a log, whole from the beginning, as far as the oldest and the
/// newest of each partition tell.
async fn of_records(topic: &str, log: &ReadableLog) -> Result<Finding, Error> {
    let partitions = (0..log.partitions()).map(Partition);
    let looked = ask_all(partitions, |partition| fault(log, partition)).await?;
    let mut records = 0;
    let mut worst: Option<Fault> = None;
    for (found, fault) in looked {
        records += found;
        worst = match (worst, fault) {
            (Some(known), Some(new))
                if known.verdict == Verdict::Unsafe || new.verdict != Verdict::Unsafe =>
            {
                Some(known)
            }
            (known, new) => new.or(known),
        };
    }
    let (topic, setting) = (topic.to_owned(), "records".to_owned());
    Ok(match worst {
        Some(Fault { verdict, value, why, remedy }) => {
            let (why, remedy) = (Some(why), Some(remedy.into()));
            Finding { topic, setting, value, verdict, why, remedy }
        }
        None => {
            let (value, verdict) = (records.to_string(), Verdict::Ok);
            Finding { topic, setting, value, verdict, why: None, remedy: None }
        }
    })
}

/// Warns of records in partitions that the log does not use.
async fn of_added(topic: &str, log: &ReadableLog) -> Result<Option<Finding>, Error> {
    let ends = ask_all(log.added_partitions(), |partition| log.ends(partition)).await?;
    let records: u64 = ends.iter().map(|(start, end)| end.0 - start.0).sum();
    Ok((records > 0).then(|| Finding {
        topic: topic.to_owned(),
        setting: "records".into(),
        value: format!("{} in added partitions", count(records, "record")),
        verdict: Verdict::Warning,
        why: Some("another program wrote them, and no reader of the log reads them".into()),
        remedy: Some("find the producer and stop it".into()),
    }))
}

/// What is wrong with the records of a partition.
struct Fault {
    verdict: Verdict,
    value: String,
    why: String,
    remedy: &'static str,
}

/// How many records the partition has, and what is wrong with them.
async fn fault(log: &ReadableLog, partition: Partition) -> Result<(u64, Option<Fault>), Error> {
    let facts = log.look(partition).await?;
    let PartitionFacts { start, end, has_own, foreign, unreadable, .. } = facts;
    let records = end.0 - start.0;
    let fault = |verdict, value, why: &str, remedy| {
        Ok((records, Some(Fault { verdict, value, why: why.to_owned(), remedy })))
    };
    if let Some((position, why)) = unreadable {
        let remedy = "use the kafold version that wrote it, or restore the topic from a copy";
        return fault(Verdict::Unsafe, format!("unreadable at {position}"), &why, remedy);
    }
    if let (Some(position), false, Offset(0)) = (foreign, has_own, start) {
        let why = "the record is not kafold's: the topic seems to be somebody else's";
        let remedy = "give this log another name: a log needs a topic of its own";
        return fault(Verdict::Unsafe, format!("foreign at {position}"), why, remedy);
    }
    match (log.check(partition, None).await, foreign) {
        (Ok(()), None) => Ok((records, None)),
        (Ok(()), Some(position)) => {
            let why = "somebody else writes to the topic: no reader counts it, but the owner of the \
                       partition has to claim it anew each time";
            let remedy = "find the producer and stop it; what is there does no harm";
            fault(Verdict::Warning, format!("foreign at {position}"), why, remedy)
        }
        (Err(error @ ReadError::Unavailable { .. }), _) => Err(error.into()),
        (Err(ReadError::Diverged { cause, .. }), _) => {
            let value = format!("partition {partition}: offsets {start} to {end}");
            let remedy = "nothing is reset by itself: a service refuses this log as well";
            fault(Verdict::Unsafe, value, &chain(&*cause), remedy)
        }
    }
}
