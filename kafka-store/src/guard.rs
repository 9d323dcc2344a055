//! Watches the logins and rights of a running process.
//!
//! The process itself would notice a lost login or right late: an open connection stays logged in,
//! and a revoked right shows at its next use only. So a task probes both. `health` and one log line
//! a minute report a refusal, and the next probe notices its end.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use chrono::{DateTime, SecondsFormat, Utc};
use kafold_core::Clock;
use rdkafka::error::KafkaResult;
use tokio::runtime::Handle;
use tokio::task::JoinSet;

use crate::client::{self, Inquirer, Refusal};
use crate::config::KafkaConfig;
use crate::error::OpenError;
use crate::prober::{Prober, is_denial};
use crate::rights::{Answer, Resource, Right, Role};

/// Interval of the rounds in which every right on a topic is probed.
const RIGHTS_INTERVAL: Duration = Duration::from_secs(5);
/// Delay of the first round: the start has priority.
const RIGHTS_DELAY: Duration = Duration::from_millis(500);
/// Interval of the new connections to every broker.
const LOGIN_INTERVAL: Duration = Duration::from_secs(10);
/// Timeout of one request of a right's probe.
const TIMEOUT: Duration = Duration::from_secs(2);
/// Probers at the same time after a failed start.
const PROBERS: usize = 3;
/// Interval of the log lines for the same refusal.
const LOG_INTERVAL: Duration = Duration::from_secs(60);

/// The current refusals of brokers, keyed by the refused right or login.
pub(crate) struct Refusals {
    clock: Arc<dyn Clock>,
    all: Mutex<BTreeMap<String, Told>>,
}

struct Told {
    reason: String,
    since: DateTime<Utc>,
    logged: Instant,
    /// The components which met the refusal. The refusal ends when the set is empty.
    by: BTreeSet<String>,
}

impl Refusals {
    pub(crate) fn new(clock: Arc<dyn Clock>) -> Self {
        Self { clock, all: Mutex::default() }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Told>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records a refusal; call again while the refusal lasts.
    pub(crate) fn raise(&self, what: &str, by: &str, reason: impl FnOnce() -> String) {
        let now = self.clock.instant();
        let mut all = self.lock();
        let is_new = !all.contains_key(what);
        let told = all.entry(what.to_owned()).or_insert_with(|| Told {
            reason: reason(),
            since: self.clock.now(),
            logged: now,
            by: BTreeSet::new(),
        });
        if !told.by.contains(by) {
            told.by.insert(by.to_owned());
        }
        if is_new || now.saturating_duration_since(told.logged) >= LOG_INTERVAL {
            told.logged = now;
            tracing::warn!(since = %shown(told.since), "{}", told.reason);
        }
    }

    /// Records a refusal met by one component, with the reason of now.
    pub(crate) fn replace(&self, what: &str, reason: String) {
        if let Some(told) = self.lock().get_mut(what) {
            told.reason.clone_from(&reason);
        }
        self.raise(what, "", || reason);
    }

    /// Removes `by` from the refusal. The refusal ends with the last component.
    pub(crate) fn clear(&self, what: &str, by: &str) {
        let mut all = self.lock();
        let Some(told) = all.get_mut(what) else { return };
        told.by.remove(by);
        if told.by.is_empty() {
            all.remove(what);
            tracing::info!("no complaint any more: {what}");
        }
    }

    /// Returns one sentence for each refusal.
    pub(crate) fn sentences(&self) -> Vec<String> {
        let sentence = |told: &Told| format!("{} (since {})", told.reason, shown(told.since));
        self.lock().values().map(sentence).collect()
    }
}

/// Formats a time for sentences.
pub(crate) fn shown(moment: DateTime<Utc>) -> String {
    moment.to_rfc3339_opts(SecondsFormat::Secs, true)
}

/// Spawns the watching tasks. Calls `limits_changed` with `max.message.bytes` of each topic, first and
/// after each change.
pub(crate) fn spawn(
    tasks: &mut JoinSet<()>,
    config: &KafkaConfig,
    role: Role,
    inquirer: &Arc<Inquirer>,
    refusals: &Arc<Refusals>,
    limits_changed: impl Fn(&BTreeMap<String, usize>) + Send + 'static,
) {
    let clock = Arc::clone(&refusals.clock);
    let mut asking = config.clone();
    asking.limits.request_timeout = asking.limits.request_timeout.min(TIMEOUT);
    let prober = Prober::new(&asking, Arc::clone(inquirer), clock);
    tasks.spawn(watch_rights(asking, role, prober, Arc::clone(refusals), limits_changed));
    tasks.spawn(watch_logins(config.clone(), Arc::clone(inquirer), Arc::clone(refusals)));
}

/// Probes the rights on topics; members of consumer groups report the refusals of groups.
async fn watch_rights(
    config: KafkaConfig,
    role: Role,
    mut prober: Prober,
    refusals: Arc<Refusals>,
    limits_changed: impl Fn(&BTreeMap<String, usize>),
) {
    let mut limits = BTreeMap::new();
    let mut absent = BTreeSet::new();
    let mut rights = role.rights(&config);
    rights.retain(|right| matches!(right.resource, Resource::Topic(_)));
    refusals.clock.sleep(RIGHTS_DELAY).await;
    loop {
        let round = tokio::task::spawn_blocking(move || {
            let asked = rights.into_iter().map(|right| (prober.ask(&right), right));
            let answers: Vec<_> = asked.collect();
            (prober, answers)
        });
        // An error means the runtime is shutting down.
        let Ok((back, mut answers)) = round.await else { return };
        prober = back;
        if prober.record_limits != limits {
            limits.clone_from(&prober.record_limits);
            limits_changed(&limits);
        }
        // Brokers log each denial.
        answers.retain(|(answer, right)| *answer != Answer::Missing || right.without.is_none());
        absent = follow_topics(&config, &answers, &absent, &refusals);
        for (answer, right) in &answers {
            let what = right.to_string();
            match answer {
                Answer::NoTopic(_) => {}
                Answer::Granted => refusals.clear(&what, ""),
                Answer::Missing => refusals.raise(&what, "", || right.complaint(&config, role)),
                Answer::Untried(why) => tracing::debug!(%right, why, "a right was not tried"),
            }
        }
        rights = answers.into_iter().map(|(_, right)| right).collect();
        refusals.clock.sleep(RIGHTS_INTERVAL).await;
    }
}

/// Raises the refusal of topics of commands and replies that are gone, and clears those of topics that are there again.
/// The store itself notices an events topic that is gone. Returns the topics without an answer of this round:
/// a broker that has just started may not know a topic yet, so a topic is gone after two rounds.
fn follow_topics(
    config: &KafkaConfig,
    answers: &[(Answer, Right)],
    before: &BTreeSet<String>,
    refusals: &Refusals,
) -> BTreeSet<String> {
    let mut absent = BTreeSet::new();
    for (answer, right) in answers {
        let Resource::Topic(topic) = &right.resource else { continue };
        let what = format!("topic {topic}");
        match answer {
            Answer::NoTopic(topic) if *topic == config.events_topic() => {}
            Answer::NoTopic(topic) => {
                if before.contains(topic) {
                    refusals.raise(&what, "", || gone(topic));
                }
                absent.insert(topic.clone());
            }
            Answer::Granted => refusals.clear(&what, ""),
            Answer::Missing | Answer::Untried(_) => {}
        }
    }
    absent
}

fn gone(topic: &str) -> String {
    format!(
        "topic {topic} is gone, and commands for streams of other nodes fail: make it again with \
         `kafold topic create`"
    )
}

/// Opens a new connection to each broker.
async fn watch_logins(config: KafkaConfig, inquirer: Arc<Inquirer>, refusals: Arc<Refusals>) {
    let mut refused: Vec<String> = Vec::new();
    loop {
        refusals.clock.sleep(LOGIN_INTERVAL).await;
        let (config, inquirer) = (config.clone(), Arc::clone(&inquirer));
        let knocking = tokio::task::spawn_blocking(move || knock_at_all(&config, &inquirer));
        let Ok(answers) = knocking.await else { return };
        let is_known = |broker: &String| answers.iter().any(|(known, _)| known == broker);
        // The broker was removed from the cluster.
        for gone in refused.extract_if(.., |broker| !is_known(broker)) {
            refusals.clear(&login(&gone), "");
        }
        for (broker, answer) in answers {
            match answer {
                Knock::Open => refusals.clear(&login(&broker), ""),
                Knock::Refused(Refusal { cause, remedy }) => {
                    let reason =
                        || format!("kafka at {broker} refuses this process: {cause}; {remedy}");
                    refusals.raise(&login(&broker), "", reason);
                    refused.push(broker);
                }
                Knock::Silent => {}
            }
        }
    }
}

fn login(broker: &str) -> String {
    format!("a connection to {broker}")
}

/// The result of a new connection.
enum Knock {
    Open,
    Refused(Refusal),
    /// No answer: the health checks of the store watch unavailable brokers.
    Silent,
}

fn knock_at_all(config: &KafkaConfig, inquirer: &Inquirer) -> Vec<(String, Knock)> {
    let known = inquirer.brokers().map(|brokers| brokers.into_iter().map(|(_, address)| address));
    let brokers: Vec<_> = match known {
        Ok(brokers) => brokers.collect(),
        Err(_) => config.brokers.split(',').map(str::to_owned).collect(),
    };
    let knock = |broker: String| {
        let config = KafkaConfig { brokers: broker.clone(), ..config.clone() };
        (broker, knock(&config))
    };
    brokers.into_iter().map(knock).collect()
}

fn knock(config: &KafkaConfig) -> Knock {
    if let Some(refusal) = client::without_address(&config.brokers) {
        return Knock::Refused(refusal);
    }
    let inquirer = match Inquirer::new(config) {
        Ok(inquirer) => inquirer,
        Err(error) => return Refusal::of(&error, "").map_or(Knock::Silent, Knock::Refused),
    };
    match advertised_in_vain(&inquirer, config) {
        Ok(None) => Knock::Open,
        Ok(Some((_, refusal))) => Knock::Refused(refusal),
        // A denial of the topic proves an accepted login.
        Err(error) if is_denial(&error) => Knock::Open,
        Err(_) => {
            let complaint = inquirer.last_error().and_then(|complaint| complaint.refusal);
            complaint.map_or(Knock::Silent, Knock::Refused)
        }
    }
}

/// Replaces the error of a failed start by the missing rights, if any is missing.
pub(crate) async fn explain(
    error: OpenError,
    config: &KafkaConfig,
    role: Role,
    clock: &Arc<dyn Clock>,
) -> OpenError {
    if !matches!(error, OpenError::Unavailable { .. } | OpenError::Refused { .. }) {
        return error;
    }
    let (mut config, clock) = (config.clone(), Arc::clone(clock));
    config.limits.request_timeout = config.limits.request_timeout.min(TIMEOUT);
    let asked = tokio::task::spawn_blocking(move || missing(&config, role, &clock));
    asked.await.ok().flatten().unwrap_or(error)
}

/// Returns the first broker with an advertised host that has no address on this machine, and the refusal
/// of the broker. An answer proves an accepted login.
fn advertised_in_vain(
    inquirer: &Inquirer,
    config: &KafkaConfig,
) -> KafkaResult<Option<(String, Refusal)>> {
    let advertised = inquirer.advertised(&config.events_topic())?;
    Ok(advertised.into_iter().find_map(|(_, broker)| {
        let refusal = client::without_address(&broker)?;
        Some((broker, refusal))
    }))
}

fn missing(config: &KafkaConfig, role: Role, clock: &Arc<dyn Clock>) -> Option<OpenError> {
    let inquirer = Inquirer::new(config).ok()?;
    match advertised_in_vain(&inquirer, config) {
        Ok(Some((broker, Refusal { cause, remedy }))) => {
            let (brokers, doing) = (config.brokers.clone(), format!("a connection to {broker}"));
            return Some(OpenError::Refused { brokers, doing, remedy, cause: client::text(cause) });
        }
        Ok(None) => {}
        Err(error) if is_denial(&error) => {}
        Err(_) => return None,
    }
    let mut needed = role.rights(config);
    needed.retain(|right| right.without.is_none());
    let missing = missing_of(&needed, config, &Arc::new(inquirer), clock);
    let (first, others) = missing.split_first()?;
    let mut cause = format!("{first} is missing for this user");
    if !others.is_empty() {
        let others: Vec<_> = others.iter().map(ToString::to_string).collect();
        cause = format!("{cause}, and {}", others.join(", "));
    }
    Some(OpenError::Refused {
        brokers: config.brokers.clone(),
        doing: format!("what a {} does", role.name()),
        remedy: first.remedy(config, role),
        cause: client::text(cause),
    })
}

/// Returns the missing ones of the rights. A first start names them within seconds, so several
/// probers work at the same time.
fn missing_of<'r>(
    rights: &'r [Right],
    config: &KafkaConfig,
    inquirer: &Arc<Inquirer>,
    clock: &Arc<dyn Clock>,
) -> Vec<&'r Right> {
    let runtime = Handle::current();
    let probe = |rights: &'r [Right]| -> Vec<&'r Right> {
        let _entered = runtime.enter();
        let mut prober = Prober::new(config, Arc::clone(inquirer), Arc::clone(clock));
        rights.iter().filter(|right| prober.ask(right) == Answer::Missing).collect()
    };
    std::thread::scope(|scope| {
        let parts = rights.chunks(rights.len().div_ceil(PROBERS).max(1));
        let probes: Vec<_> = parts.map(|part| scope.spawn(|| probe(part))).collect();
        // A prober which panicked has found nothing; the first error stands.
        probes.into_iter().flat_map(|probe| probe.join().unwrap_or_default()).collect()
    })
}

#[cfg(test)]
mod tests {
    use kafold_core::clock::SystemClock;

    use super::*;

    #[test]
    fn a_refusal_is_over_when_everybody_got_through() {
        let refusals = Refusals::new(Arc::new(SystemClock));
        for by in ["a", "b", "b"] {
            refusals.raise("Read on groups o.reader*", by, || "Read is missing".into());
        }
        let sentences = refusals.sentences();
        assert_eq!(sentences.len(), 1);
        assert!(sentences[0].starts_with("Read is missing (since 20"), "{sentences:?}");
        refusals.clear("Read on groups o.reader*", "a");
        assert_eq!(refusals.sentences().len(), 1, "b is still refused");
        refusals.clear("Read on groups o.reader*", "b");
        assert!(refusals.sentences().is_empty());
    }
}
