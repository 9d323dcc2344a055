//! Brokers with TLS, logins and rights: successful connections, and the sentences for failures.

use crate::support;

use std::sync::Arc;

use kafold_core::StreamId;
use kafold_core::clock::RandomIds;
use kafold_core::memory::MemoryIndex;
use kafold_core::testing::{commit, exact};
use kafold_kafka_store::{KafkaConfig, KafkaStore, Operator};
use support::{Tls, WAIT_MAX};

/// Most logs opened at the same time. Each one has several clients, each with a TLS handshake.
const OPENED_AT_ONCE: usize = 4;

/// Opens the log until the error is permanent or the deadline has passed: on a busy machine a slow
/// handshake is a transient error. Returns the error's text, and `true` for a transient error.
async fn refused(url: &str) -> (String, bool) {
    let deadline = tokio::time::Instant::now() + WAIT_MAX;
    loop {
        let (text, is_transient) = refused_once(url).await;
        if !is_transient || tokio::time::Instant::now() > deadline {
            return (text, is_transient);
        }
    }
}

async fn refused_once(url: &str) -> (String, bool) {
    let config: KafkaConfig = match url.parse() {
        Ok(config) => config,
        Err(error) => return (error.to_string(), false),
    };
    let index = Arc::new(MemoryIndex::new());
    let open = KafkaStore::open(
        config,
        index,
        support::owner("tls"),
        support::clock(),
        Arc::new(RandomIds),
    );
    let ended = tokio::time::timeout(WAIT_MAX, open).await;
    let opened = ended.unwrap_or_else(|_| panic!("{url} is not refused in time"));
    let Err(error) = opened else { panic!("{url} was opened") };
    (error.to_string(), error.is_transient())
}

#[tokio::test(flavor = "multi_thread")]
async fn each_wrong_transport_is_refused_by_a_sentence_of_its_own() {
    let Some(tls) = Tls::of_environment("each_wrong_transport_is_refused") else { return };
    let Tls { client, mutual, other_host, expired, clear, .. } = &tls;
    let (ca, login) = (tls.file("ca.crt"), tls.login("admin"));
    let (certificate, key) = (tls.file("client.crt"), tls.file("client.key"));
    let cases = [
        (
            format!("{client}/o?tls=true&ca={ca}&sasl=scram-sha-512&user=admin&password=wrong"),
            ["the user is unknown or the password is wrong", "password="],
        ),
        (
            format!("{client}/o?tls=true&ca={ca}&sasl=scram-sha-512&user=nobody&password=wrong"),
            ["the user is unknown or the password is wrong", "user="],
        ),
        (
            format!("{client}/o?tls=true&ca={ca}&sasl=plain&user=admin&password=wrong"),
            ["does not take this SASL mechanism, but SCRAM-SHA-", "set sasl="],
        ),
        (
            format!("{client}/o?tls=true&ca={ca}&librdkafka.sasl.mechanism=GSSAPI"),
            ["cannot log in by SASL mechanism GSSAPI", "set sasl="],
        ),
        (
            format!("{client}/o?tls=true&ca={}&{login}", tls.file("other-ca.crt")),
            ["an authority that is not trusted here", "set ca="],
        ),
        (
            format!("{client}/o?tls=true&{login}"),
            ["an authority that is not trusted here", "set ca="],
        ),
        (
            format!("{other_host}/o?tls=true&ca={ca}&{login}"),
            ["is for other-host.example and not for 127.0.0.1", "connect by a name"],
        ),
        (
            format!("{expired}/o?tls=true&ca={ca}&{login}"),
            ["expired on Jan  1 00:00:00 2021 GMT", "new certificate"],
        ),
        (
            format!("{mutual}/o?tls=true&ca={ca}"),
            ["wants a certificate of the client, and there is none", "cert=FILE&key=FILE"],
        ),
        (
            format!(
                "{mutual}/o?tls=true&ca={ca}&cert={}&key={}",
                tls.file("other-ca.crt"),
                tls.file("other-ca.key")
            ),
            ["does not accept the certificate of the client", "set cert= and key="],
        ),
        (format!("{client}/o?"), ["takes TLS only", "?tls=true"]),
        (format!("{client}/o?{login}"), ["takes TLS only", "?tls=true"]),
        (
            format!("{clear}/o?tls=true&ca={ca}&{login}"),
            ["takes clear text only", "remove tls=true"],
        ),
        (format!("{client}/o?tls=true&ca={ca}"), ["wants a login", "sasl=scram-sha-512"]),
        (
            format!("{mutual}/o?tls=true&ca={ca}&cert={certificate}&key={key}&{login}"),
            ["takes no login at this port", "remove sasl="],
        ),
        (format!("{client}/o?tls=true&ca={key}&{login}"), ["ca", "no certificate"]),
    ];
    let permits = Arc::new(tokio::sync::Semaphore::new(OPENED_AT_ONCE));
    let tasks = cases.map(|(place, words)| {
        let permits = Arc::clone(&permits);
        tokio::spawn(async move {
            let _permit = permits.acquire_owned().await.expect("never closed");
            (refused(&format!("kafka://{place}")).await, place, words)
        })
    });
    let mut wrong = Vec::new();
    for task in tasks {
        let ((text, is_transient), place, words) = task.await.expect("no panic");
        if is_transient || !words.iter().all(|word| text.contains(word)) || text.contains('\n') {
            wrong.push(format!(
                "{place}\n  is not {words:?} but {text:?} (transient: {is_transient})"
            ));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Appends an event over each kind of login.
#[tokio::test(flavor = "multi_thread")]
async fn every_login_and_a_client_certificate_reach_the_log() {
    let Some(tls) = Tls::of_environment("every_login_and_a_client_certificate") else { return };
    let ca = tls.file("ca.crt");
    let login = tls.login("admin");
    let ways = [
        format!("{}/NAME?tls=true&ca={ca}&{login}", tls.client),
        format!("{}/NAME?tls=true&ca={ca}&{}", tls.client, login.replace("512", "256")),
        format!(
            "{}/NAME?tls=true&ca={ca}&cert={}&key={}",
            tls.mutual,
            tls.file("admin.crt"),
            tls.file("admin.key")
        ),
        format!("{}/NAME?{login}&allow_unsafe=clear_text", tls.clear),
    ];
    for way in ways {
        let name = support::new_name("tls");
        let url = format!("kafka://{}&partitions=1", way.replace("NAME", &name));
        let store = support::open(url.parse().expect("a valid URL"), "tls").await;
        let stream: StreamId = "order-1".parse().expect("valid");
        let appended = support::settle(&store, &stream, exact(0), &commit(1)).await;
        assert_eq!(appended.version.0, 1, "{url}");
        store.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_other_end_of_a_connection_is_shown() {
    let Some(tls) = Tls::of_environment("the_other_end_of_a_connection") else { return };
    let url = format!(
        "kafka://{}/o?tls=true&ca={}&{}",
        tls.client,
        tls.file("ca.crt"),
        tls.login("admin")
    );
    let config: KafkaConfig = url.parse().expect("a valid URL");
    let operator = Operator::connect(config, support::clock()).await.expect("connected");
    let brokers = operator.brokers().await.expect("brokers");
    let (api, peer) = operator.broker_api(&brokers[0]).await.expect("an answer");
    let peer = peer.expect("TLS");
    assert!(api.is_new_enough);
    assert_eq!((peer.protocol.as_str(), peer.issuer.as_str()), ("TLSv1.3", "kafold test ca"));
    assert_eq!(peer.names, ["localhost", "127.0.0.1"]);
    assert!(peer.days_left > 365, "{peer:?}");
}

/// The password changes on the brokers and then in the file. Requests succeed again, and a store
/// opened before the change appends.
#[tokio::test(flavor = "multi_thread")]
async fn a_changed_password_file_is_used_without_a_restart() {
    let Some(tls) = Tls::of_environment("a_changed_password_file") else { return };
    let name = support::new_name("rotating");
    let principal = format!("User:{name}");
    tls.run(&["user", &name, "first"]);
    let everything = ["--topic", "*", "--group", "*", "--operation", "All"];
    tls.run(&[&["acl", "--add", "--allow-principal", &principal][..], &everything].concat());
    let file = tls.secret_file(&name, "first");
    let url = format!(
        "kafka://{}/{name}?partitions=1&tls=true&ca={}&sasl=scram-sha-512&user={name}&password=@{}",
        tls.client,
        tls.file("ca.crt"),
        file.display()
    );
    let config: KafkaConfig = url.parse().expect("a valid URL");
    let creator = format!(
        "kafka://{}/{name}?partitions=1&tls=true&ca={}&{}",
        tls.client,
        tls.file("ca.crt"),
        tls.login("admin")
    );
    let creator = Operator::connect(creator.parse().expect("a valid URL"), support::clock());
    creator.await.expect("connected").create_topics().await.expect("created");
    let operator = Operator::connect(config.clone(), support::clock()).await.expect("connected");
    operator.brokers().await.expect("the first password is right");
    let store = support::open(config, "rotating").await;
    let stream: StreamId = "order-1".parse().expect("valid");
    support::settle(&store, &stream, exact(0), &commit(1)).await;

    tls.run(&["user", &name, "second"]);
    let deadline = tokio::time::Instant::now() + WAIT_MAX;
    let told = loop {
        match operator.brokers().await {
            // This connection was opened with the old password.
            Ok(_) => assert!(tokio::time::Instant::now() < deadline, "the old password still goes"),
            Err(error) => break error.to_string(),
        }
        support::pause().await;
    };
    assert!(told.contains("the user is unknown or the password is wrong"), "{told}");
    tls.secret_file(&name, "second");
    while operator.brokers().await.is_err() {
        assert!(tokio::time::Instant::now() < deadline, "the new password is not used");
        support::pause().await;
    }
    // By now the brokers have requested a re-authentication of every connection.
    support::ready(&store).await;
    support::settle(&store, &stream, exact(1), &commit(1)).await;
    store.shutdown().await;
}
