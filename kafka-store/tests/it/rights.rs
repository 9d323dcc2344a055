//! Each role works under exactly the rights of `acl print`, and each revoked right is named.

use crate::support;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use futures_util::{StreamExt, stream};
use kafold_core::clock::{RandomIds, SystemClock};
use kafold_core::memory::MemoryIndex;
use kafold_core::store::{Health, Subscription};
use kafold_core::testing::{commit, new_stream};
use kafold_core::{Clock, EventSource, EventStore, ExpectedVersion};
use kafold_kafka_store::rights::{Answer, Resource, Right, Role};
use kafold_kafka_store::{KafkaConfig, KafkaSource, KafkaStore, Operator};
use support::Tls;

/// Deadline for naming a missing right.
const NAMED_WITHIN: Duration = Duration::from_secs(15);
/// Deadline for work with a restored right.
const READY_WITHIN: Duration = Duration::from_secs(30);
const STARTS_AT_ONCE: usize = 4;
/// A user with the rights of every role, each on its own logs.
const USER: &str = "service";
const PROJECTION: &str = "things";

/// A log of one role, and the right to revoke.
struct Case {
    role: Role,
    config: KafkaConfig,
    right: Right,
    running: Running,
}

/// The long-running part of a role.
enum Running {
    Service(KafkaStore, #[expect(dead_code, reason = "is in its group")] Box<dyn Subscription>),
    Worker(KafkaSource, #[expect(dead_code, reason = "is in its group")] Box<dyn Subscription>),
    Nothing,
}

impl Running {
    fn health(&self) -> Health {
        match self {
            Self::Service(store, _) => store.health(),
            Self::Worker(source, _) => source.health(),
            Self::Nothing => Health::Ready,
        }
    }
}

/// Waits for a condition on the health of a process.
async fn until(what: &str, limit: Duration, running: &Running, is: impl Fn(&[String]) -> bool) {
    let deadline = SystemClock.instant() + limit;
    loop {
        let reasons = match running.health() {
            Health::Ready => Vec::new(),
            Health::NotReady(reasons) => reasons,
        };
        if is(&reasons) {
            return;
        }
        assert!(SystemClock.instant() < deadline, "{what}: not within {limit:?}: {reasons:?}");
        support::pause().await;
    }
}

fn needed(role: Role, config: &KafkaConfig) -> Vec<Right> {
    role.rights(config).into_iter().filter(|right| right.without.is_none()).collect()
}

/// Runs the printed commands, merged by operation and kind of resource, because each command starts
/// a JVM.
async fn acl(tls: &Arc<Tls>, change: &'static str, rights: &[&Right]) {
    let mut commands: BTreeMap<Vec<String>, Vec<String>> = BTreeMap::new();
    for right in rights {
        let printed = right.command("BROKERS", &format!("User:{USER}"));
        let words: Vec<_> = printed.split(' ').skip(4).map(str::to_owned).collect();
        let is_named = !words.ends_with(&["--cluster".to_owned()]);
        let (command, names) = words.split_at(words.len() - if is_named { 2 } else { 1 });
        let mut command = command.to_vec();
        command.push(names[0].clone());
        let all = commands.entry(command).or_default();
        if is_named || all.is_empty() {
            all.extend(names.iter().cloned());
        }
    }
    for (mut command, names) in commands {
        command.pop();
        let mut arguments = vec!["acl".to_owned(), change.to_owned()];
        arguments.extend(command.into_iter().chain(names));
        if change == "--remove" {
            arguments.push("--force".to_owned());
        }
        let tls = Arc::clone(tls);
        let run = move || tls.run(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
        tokio::task::spawn_blocking(run).await.expect("Kafka's tool");
    }
}

async fn start(role: Role, config: &KafkaConfig) -> Running {
    match role {
        Role::Service => {
            let store =
                support::open_with(config.clone(), Arc::new(MemoryIndex::new()), "rights").await;
            let reading = store.source().subscribe(PROJECTION, None, 1).await.expect("subscribed");
            Running::Service(store, reading)
        }
        Role::Worker => {
            let source = KafkaSource::open(config.clone(), support::clock()).await.expect("opened");
            let reading = source.subscribe(PROJECTION, None, 1).await.expect("subscribed");
            Running::Worker(source, reading)
        }
        Role::Reader | Role::Doctor | Role::Admin => Running::Nothing,
    }
}

/// Performs the work of the role.
async fn work(case: &Case) {
    let operator = || Operator::connect(case.config.clone(), support::clock());
    match (&case.running, case.role) {
        (Running::Service(store, _), _) => {
            store
                .append(&new_stream(), ExpectedVersion::NoStream, commit(1))
                .await
                .expect("a service writes");
        }
        (_, Role::Worker) => {}
        (_, Role::Reader) => {
            let log = operator().await.expect("connected").log().await.expect("found");
            log.expect("there").look(kafold_core::Partition(0)).await.expect("a reader reads");
        }
        (_, Role::Doctor) => {
            let operator = operator().await.expect("connected");
            operator.check_topics().await.expect("a doctor judges topics");
            operator.broker_settings(1, &["num.io.threads"]).await.expect("and brokers");
        }
        (_, _) => {
            let made = operator().await.expect("connected").create_topics().await;
            assert_eq!(made.expect("an admin makes topics").len(), 3);
        }
    }
}

/// Waits for the running process to name the right of the case.
async fn named(case: &Case) {
    let Case { role, config, right, running } = case;
    if matches!(running, Running::Nothing) {
        return;
    }
    let command = right.command(&config.brokers, &format!("User:{USER}"));
    let says = |reason: &String| {
        reason.contains(&format!("{right} is missing")) && reason.contains(&command)
    };
    let what = format!("a {} says that {right} is missing", role.name());
    until(&what, NAMED_WITHIN, running, |reasons| reasons.iter().any(says)).await;
}

/// Checks the missing right in `try_rights` and in a start.
async fn missing(case: &Case) {
    let Case { role, config, right, .. } = case;
    let command = right.command(&config.brokers, &format!("User:{USER}"));
    let operator = Operator::connect(config.clone(), support::clock()).await;
    let tried = operator.expect("connected").try_rights(*role).await.expect("tried");
    for (tried, answer) in tried.into_iter().filter(|(tried, _)| tried.without.is_none()) {
        // The right on the cluster is shared by all logs.
        let is_taken = tried == *right || tried.resource == Resource::Cluster;
        let expected = if is_taken { Answer::Missing } else { Answer::Granted };
        assert_eq!(answer, expected, "{tried}, without {right}, as a {}", role.name());
    }
    let clock = support::clock();
    let (index, ids) = (Arc::new(MemoryIndex::new()), Arc::new(RandomIds));
    let begun = match role {
        Role::Service => {
            let owner = support::owner("again");
            KafkaStore::open(config.clone(), index, owner, clock, ids).await.err()
        }
        Role::Worker => KafkaSource::open(config.clone(), clock).await.err(),
        _ => None,
    };
    // The health of a running process names a right first needed after the start.
    if let Some(error) = begun {
        let text = error.to_string();
        assert!(text.contains(&command) && !error.is_transient(), "{text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_role_works_under_the_printed_rights_and_names_each_that_is_taken_away() {
    let Some(tls) = Tls::of_environment("each_role_works_under_the_printed_rights") else { return };
    let tls = Arc::new(tls);
    let place = |name: &str, user: &str| -> KafkaConfig {
        let (brokers, ca, login) = (&tls.client, tls.file("ca.crt"), tls.login(user));
        let url = format!("kafka://{brokers}/{name}?partitions=1&tls=true&ca={ca}&{login}");
        url.parse().expect("a valid URL")
    };
    let wanted = Role::ALL.into_iter().flat_map(|role| {
        (0..needed(role, &place("any", USER)).len()).map(move |index| (role, index))
    });
    let made = wanted.map(async |(role, index)| {
        let name = support::new_name(&format!("rights-{}", role.name()));
        let operator = Operator::connect(place(&name, "admin"), support::clock()).await;
        operator.expect("connected").create_topics().await.expect("made");
        let config = place(&name, USER);
        let right = needed(role, &config).swap_remove(index);
        (role, config, right)
    });
    let logs = join_all(made).await;
    let all: Vec<_> = logs.iter().flat_map(|(role, config, _)| needed(*role, config)).collect();
    acl(&tls, "--add", &all.iter().collect::<Vec<_>>()).await;
    let started = logs.into_iter().map(async |(role, config, right)| {
        let running = start(role, &config).await;
        let case = Case { role, config, right, running };
        let what = format!("a {} is ready", role.name());
        until(&what, support::WAIT_MAX, &case.running, <[_]>::is_empty).await;
        work(&case).await;
        case
    });
    let cases: Vec<_> = stream::iter(started).buffered(STARTS_AT_ONCE).collect().await;

    acl(&tls, "--remove", &cases.iter().map(|case| &case.right).collect::<Vec<_>>()).await;
    join_all(cases.iter().map(named)).await;
    // Limits the concurrency: each start creates clients, and each client performs a handshake.
    stream::iter(&cases).for_each_concurrent(STARTS_AT_ONCE, missing).await;

    let runs = |case: &&Case| !matches!(case.running, Running::Nothing);
    let taken: Vec<_> = cases.iter().filter(runs).map(|case| &case.right).collect();
    acl(&tls, "--add", &taken).await;
    let going_on = cases.iter().filter(runs).map(async |case| {
        let what = format!("a {} goes on with {}", case.role.name(), case.right);
        until(&what, READY_WITHIN, &case.running, <[_]>::is_empty).await;
        work(case).await;
    });
    join_all(going_on).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_password_that_brokers_do_not_take_any_more_is_told_and_taken_again() {
    let Some(tls) = Tls::of_environment("a_password_that_brokers_do_not_take_any_more") else {
        return;
    };
    let tls = Arc::new(tls);
    let run = async |arguments: Vec<String>| {
        let tls = Arc::clone(&tls);
        let run = move || tls.run(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
        tokio::task::spawn_blocking(run).await.expect("Kafka's tool");
    };
    let name = support::new_name("login");
    let password =
        async |password: &str| run(vec!["user".into(), name.clone(), password.into()]).await;
    password("right").await;
    let granted = format!(
        "acl --add --allow-principal User:{name} --operation All --resource-pattern-type prefixed \
         --topic {name} --group {name}"
    );
    run(granted.split_whitespace().map(str::to_owned).collect()).await;
    let file = tls.secret_file(&name, "right");
    let (brokers, ca, file) = (&tls.client, tls.file("ca.crt"), file.display());
    let url = format!(
        "kafka://{brokers}/{name}?partitions=1&replication=1&tls=true&ca={ca}&sasl=scram-sha-512&user={name}&password=@{file}"
    );
    let store = support::open(url.parse().expect("a valid URL"), "login").await;
    let source = store.source().subscribe(PROJECTION, None, 1).await.expect("subscribed");
    let running = Running::Service(store, source);

    password("other").await;
    let told =
        |reasons: &[String]| reasons.iter().any(|reason| reason.contains("password is wrong"));
    until("the refusal is told", READY_WITHIN, &running, told).await;
    password("right").await;
    until("the login is taken again", READY_WITHIN, &running, <[_]>::is_empty).await;
    let Running::Service(store, _) = &running else { unreachable!("it is a service") };
    store.append(&new_stream(), ExpectedVersion::NoStream, commit(1)).await.expect("it goes on");
}
