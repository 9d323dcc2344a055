//! Brokers, topics and rights.

use std::collections::BTreeSet;

use kafold::Database;
use kafold::kafka::Operator;
use kafold::kafka::operate::{Broker, Peer};

use super::Checks;
use crate::admin::Context;
use crate::commands::topic::{self, Verdict};
use crate::error::Error;
use crate::log::operator;
use crate::options::LogUrl;
use crate::output::count;

/// Brokers of which one may be lost without losing or blocking anything.
const BROKERS_SAFE: usize = 3;
/// How soon a node that died is to be noticed, in milliseconds: the store's own wish.
const SESSION_TIMEOUT_WANTED_MS: u64 = 2_000;

/// Least remaining validity of a certificate, in days, without a warning.
const CERTIFICATE_DAYS_SAFE: i32 = 30;

const AUTO_CREATE: &str = "auto.create.topics.enable";
const SESSION_TIMEOUT_MIN: &str = "group.min.session.timeout.ms";
const OFFSETS_REPLICATION: &str = "offsets.topic.replication.factor";

/// Whether the log can be looked at further.
pub(super) async fn check(context: &Context, url: &LogUrl, checks: &mut Checks) -> bool {
    let connected = async {
        let operator = operator(url, &context.clock).await?;
        let brokers = operator.brokers().await?;
        Ok::<_, Error>((operator, brokers))
    };
    let (operator, brokers) = match connected.await {
        Ok(connected) => connected,
        Err(error) => {
            checks.failed("brokers", &error);
            return false;
        }
    };
    for warning in operator.config().warnings() {
        checks.warning("brokers: URL", warning, "change the log's URL");
    }
    check_brokers(&brokers, checks);
    check_versions(&operator, &brokers, checks).await;
    check_settings(&operator, &brokers, checks).await;
    let Some(absent) = check_topics(&operator, checks).await else { return false };
    check_rights(&operator, absent.is_empty(), checks).await;
    !absent.contains(&operator.config().events_topic())
}

/// Reports members of the log's groups that are no part of the service.
pub(super) async fn check_groups(
    context: &Context,
    url: &LogUrl,
    database: Option<&Database>,
    checks: &mut Checks,
) {
    const NAME: &str = "groups";
    let found = async {
        let operator = operator(url, &context.clock).await?;
        Ok::<_, Error>(operator.strangers(database.map(Database::identity)).await?)
    };
    match found.await {
        Ok(strangers) if strangers.is_empty() => {
            checks.ok(NAME, "no member of another program is visible");
        }
        Ok(strangers) => {
            for stranger in strangers {
                checks.problem(
                    NAME,
                    stranger,
                    "stop a program that uses the log's groups and is no part of the service, or give the \
                     database that the nodes of the service write",
                );
            }
        }
        Err(error) => checks.failed(NAME, &error),
    }
}

fn check_brokers(brokers: &[Broker], checks: &mut Checks) {
    let addresses: Vec<_> = brokers.iter().map(|broker| broker.address.as_str()).collect();
    let found = format!("{}: {}", count(brokers.len() as u64, "broker"), addresses.join(", "));
    match brokers.len() < BROKERS_SAFE {
        true => checks.warning(
            "brokers",
            format!("{found}; losing one stops the log, or loses events"),
            "run three brokers or more, with ?replication=3",
        ),
        false => checks.ok("brokers", found),
    }
}

async fn check_versions(operator: &Operator, brokers: &[Broker], checks: &mut Checks) {
    const NAME: &str = "brokers: version";
    let mut shown = BTreeSet::new();
    for broker in brokers {
        let address = &broker.address;
        match operator.broker_api(broker).await {
            Ok((api, peer)) if api.is_new_enough => {
                shown.insert(format!("Fetch up to {} of {} requests", api.fetch_max, api.kinds));
                if let Some(peer) = peer {
                    check_peer(address, &peer, checks);
                }
            }
            Ok(_) => {
                let found = format!("{address} is older than Kafka 2.8");
                checks.problem(NAME, found, "use brokers of Kafka 2.8 or newer");
            }
            Err(error) => {
                let found = format!("{address} does not tell its version: {error}");
                checks.warning(NAME, found, "see that this machine reaches every broker");
            }
        }
    }
    if !shown.is_empty() {
        let shown: Vec<_> = shown.into_iter().collect();
        checks.ok(NAME, shown.join(", "));
    }
}

/// Reports the certificate of a broker and its remaining validity.
fn check_peer(address: &str, peer: &Peer, checks: &mut Checks) {
    const NAME: &str = "brokers: TLS";
    let Peer { protocol, names, issuer, days_left } = peer;
    let found = format!(
        "{address}: {protocol}, certificate for {} by {issuer}, {days_left} days left",
        names.join(", ")
    );
    match *days_left < CERTIFICATE_DAYS_SAFE {
        true => checks.warning(NAME, found, "give the broker a new certificate before it expires"),
        false => checks.ok(NAME, found),
    }
}

async fn check_settings(operator: &Operator, brokers: &[Broker], checks: &mut Checks) {
    const WANTED: &[&str] = &[AUTO_CREATE, SESSION_TIMEOUT_MIN, OFFSETS_REPLICATION];
    let mut seen: BTreeSet<(&str, String)> = BTreeSet::new();
    for broker in brokers {
        match operator.broker_settings(broker.id, WANTED).await {
            Ok(settings) => seen.extend(settings),
            Err(error) => {
                let remedy = "allow this user DescribeConfigs on the cluster";
                checks.warning("brokers: settings", error.to_string(), remedy);
                return;
            }
        }
    }
    let before = checks.0.len();
    for (setting, value) in &seen {
        check_setting(setting, value, brokers.len(), checks);
    }
    if checks.0.len() == before {
        let shown: Vec<_> = seen.iter().map(|(name, value)| format!("{name}={value}")).collect();
        checks.ok("brokers: settings", shown.join(", "));
    }
}

fn check_setting(setting: &str, value: &str, brokers: usize, checks: &mut Checks) {
    let number = value.parse::<u64>().unwrap_or(0);
    let (why, remedy) = match setting {
        AUTO_CREATE if value == "true" => (
            "a topic that was deleted comes back empty, with settings that lose events".to_owned(),
            format!("set {AUTO_CREATE}=false on the brokers"),
        ),
        SESSION_TIMEOUT_MIN if number > SESSION_TIMEOUT_WANTED_MS => (
            format!("a node that died is noticed after {number} ms at the soonest"),
            format!("set {SESSION_TIMEOUT_MIN}={SESSION_TIMEOUT_WANTED_MS} or less on the brokers"),
        ),
        OFFSETS_REPLICATION if number < brokers.min(BROKERS_SAFE) as u64 => (
            "losing one broker may stop the groups that spread partitions over nodes".to_owned(),
            "add copies to the topic __consumer_offsets with kafka-reassign-partitions.sh"
                .to_owned(),
        ),
        _ => return,
    };
    checks.warning("brokers: settings", format!("{setting}={value}: {why}"), remedy);
}

/// The topics that are not there; `None` when nobody can tell.
async fn check_topics(operator: &Operator, checks: &mut Checks) -> Option<Vec<String>> {
    let findings = match topic::findings(operator).await {
        Ok(findings) => findings,
        Err(error) => {
            checks.failed("topics", &error);
            return None;
        }
    };
    let is_sound = |finding: &&topic::Finding| finding.verdict == Verdict::Ok;
    let sound = findings.iter().filter(is_sound).count() as u64;
    if sound > 0 {
        checks.ok("topics", format!("{} as they should be", count(sound, "setting")));
    }
    for finding in findings.iter().filter(|finding| finding.verdict != Verdict::Ok) {
        let found = finding.sentence();
        let remedy = finding.remedy.as_deref().unwrap_or_default();
        match finding.verdict {
            Verdict::Warning => checks.warning("topics", found, remedy),
            Verdict::Ok | Verdict::Unsafe => checks.problem("topics", found, remedy),
        }
    }
    let absent = findings.into_iter().filter(|finding| finding.setting == topic::ABSENT);
    Some(absent.map(|finding| finding.topic).collect())
}

/// Probes the right to create topics if a topic is missing. Other checks read and describe the
/// topics already; existing topics need no right to create, and a probe would find no denial.
async fn check_rights(operator: &Operator, all_exist: bool, checks: &mut Checks) {
    if all_exist {
        checks.ok("rights: create", "not tried, and not needed: the topics are there");
    } else {
        match operator.may_create_topics().await {
            Ok(()) => checks.ok("rights: create", "this user may create topics"),
            Err(error) => checks.failed("rights: create", &error.into()),
        }
    }
    checks.ok("rights: others", "`doctor --as ROLE` tries those of a service, or of another role");
}
