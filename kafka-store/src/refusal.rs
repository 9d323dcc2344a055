//! Permanent errors of brokers and of the client, with cause and remedy.

use rdkafka::error::{KafkaError, RDKafkaErrorCode};

/// A permanent error: an operator must act. Every other error may pass, and is retried.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Refusal {
    /// The fault, with the client's text in brackets.
    pub(crate) cause: String,
    /// The remedy, as an imperative.
    pub(crate) remedy: String,
}

impl Refusal {
    pub(crate) fn new(cause: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { cause: cause.into(), remedy: remedy.into() }
    }

    /// Classifies an error; `reason` is librdkafka's additional text and may be empty.
    ///
    /// A lost connection is no refusal, because the broker may be restarting. A handshake of our
    /// own detects TLS at only one end.
    pub(crate) fn of(error: &KafkaError, reason: &str) -> Option<Self> {
        match error {
            KafkaError::ClientCreation(text) => Some(of_creation(text)),
            KafkaError::ClientConfig(_, _, key, _) => {
                Some(of_creation(&format!("librdkafka does not take {key}")))
            }
            error => of_code(code(error)?, reason),
        }
    }
}

/// Returns `true` if the client rejects the broker's certificate. librdkafka has one text for every
/// fault of a certificate.
pub(crate) fn is_certificate(reason: &str) -> bool {
    reason.contains("certificate verify failed") || reason.contains("error:0A000086")
}

pub(crate) fn code(error: &KafkaError) -> Option<RDKafkaErrorCode> {
    match error {
        KafkaError::AdminOp(code) => Some(*code),
        other => other.rdkafka_error_code(),
    }
}

/// Classifies a failed creation of a client, which no retry repairs.
fn of_creation(text: &str) -> Refusal {
    if let Some(rest) = text.split("No provider for SASL mechanism ").nth(1) {
        let mechanism = rest.split([':', ' ']).next().unwrap_or_default();
        return Refusal::new(
            format!("this client cannot log in by SASL mechanism {mechanism} ({text})"),
            "set sasl=scram-sha-512, scram-sha-256 or plain, whichever the broker takes",
        );
    }
    if text.contains("OpenSSL not available") {
        return Refusal::new(
            format!("this program was built without TLS ({text})"),
            "build it with kafold's feature tls, which is on by default",
        );
    }
    Refusal::new(text, "check the options of the URL for TLS and login")
}

fn of_code(code: RDKafkaErrorCode, reason: &str) -> Option<Refusal> {
    use RDKafkaErrorCode as C;
    let words = without_place(reason);
    let said = |cause: &str| match words {
        "" => cause.to_owned(),
        words => format!("{cause} ({words})"),
    };
    let (cause, remedy) = match code {
        C::UnsupportedSASLMechanism => of_mechanism(words),
        C::IllegalSASLState => (
            "the broker takes no login at this port".to_owned(),
            "remove sasl= and user=, or connect to the broker's SASL listener",
        ),
        C::Authentication | C::SaslAuthenticationFailed => of_authentication(words),
        C::SSL => of_tls(words),
        code => (said(&KafkaError::Global(code).to_string()), remedy(code)?),
    };
    let cause = match words {
        _ if cause.ends_with(')') => cause,
        _ => said(&cause),
    };
    Some(Refusal::new(cause, remedy))
}

fn of_authentication(words: &str) -> (String, &'static str) {
    if words.contains("Unsupported SASL mechanism") {
        return of_mechanism(words);
    }
    if words.contains("not valid in current SASL state") {
        return (
            "the broker takes no login at this port".to_owned(),
            "remove sasl= and user=, or connect to the broker's SASL listener",
        );
    }
    if words.contains("ServerSignature mismatch") {
        return (
            "the broker does not know the password that it accepted, so it is another server"
                .to_owned(),
            "check the brokers in the URL",
        );
    }
    (
        "the user is unknown or the password is wrong".to_owned(),
        "check user= and password= of the URL, and that the brokers have this user for this \
         mechanism (kafka-configs.sh --describe --entity-type users)",
    )
}

fn of_mechanism(words: &str) -> (String, &'static str) {
    let taken = words.split("supported mechanisms: ").nth(1).unwrap_or_default();
    let taken = taken.split([' ', ')']).next().unwrap_or_default();
    let cause = match taken {
        "" => "the broker does not take this SASL mechanism".to_owned(),
        taken => format!("the broker does not take this SASL mechanism, but {taken}"),
    };
    (cause, "set sasl= to a mechanism that the broker takes")
}

fn of_tls(words: &str) -> (String, &'static str) {
    if is_certificate(words) {
        return (
            "the broker's certificate is not valid here".to_owned(),
            "set ca= to the authority that signed it, connect by a host name that it has, and renew \
             it when it has expired",
        );
    }
    if wants_certificate(words) {
        return (
            "the broker does not accept the client's certificate, or wants one and got none"
                .to_owned(),
            "set cert= and key= to a certificate that the broker's authority signed",
        );
    }
    (
        "no TLS connection comes about".to_owned(),
        "check tls=, ca=, cert= and key= of the URL, and that the port is a TLS listener",
    )
}

/// Returns `true` for an alert of the broker about the client's certificate.
pub(crate) fn wants_certificate(words: &str) -> bool {
    const ALERTS: &[&str] = &[
        "bad certificate",
        "certificate required",
        "certificate unknown",
        "certificate expired",
        "certificate revoked",
        "unsupported certificate",
        "unknown ca",
        "client SSL authentication might be required",
    ];
    // The words of an alert come from the broker; all other texts about certificates come from the
    // client.
    let is_alert = words.contains("alert") || words.contains("unexpected message");
    is_alert && ALERTS.iter().any(|alert| words.contains(alert))
}

/// Returns the remedy of a permanent error code.
fn remedy(code: RDKafkaErrorCode) -> Option<&'static str> {
    use RDKafkaErrorCode as C;
    Some(match code {
        C::TopicAuthorizationFailed => {
            "allow this user Describe, DescribeConfigs, Read and Write on the topic"
        }
        C::ClusterAuthorizationFailed => {
            "allow this user Create and IdempotentWrite on the cluster, or create the topics"
        }
        C::GroupAuthorizationFailed => {
            "allow this user Read on the consumer groups whose names begin with NAME"
        }
        C::InvalidReplicationFactor => "set ?replication= to at most the number of brokers",
        C::InvalidTopic => "choose another log name",
        C::PolicyViolation | C::InvalidConfig => {
            "create the topic by hand as the broker's policy wants it"
        }
        C::UnsupportedVersion => "use a broker of Kafka 2.8 or newer",
        _ => return None,
    })
}

/// Returns the text behind the broker's address:
/// `sasl_ssl://HOST:PORT/ID: TEXT (after 5ms in state X)`.
fn without_place(reason: &str) -> &str {
    let text = reason.split_once("://").and_then(|(_, rest)| rest.split_once(": "));
    let text = text.map_or(reason, |(_, text)| text);
    text.rsplit_once(" (after ").map_or(text, |(text, _)| text)
}

/// Returns the broker's address in a reason, as `HOST:PORT`.
pub(crate) fn place(reason: &str) -> Option<&str> {
    let (_, rest) = reason.split_once("://")?;
    let end = rest.find(['/', ' ']).unwrap_or(rest.len());
    Some(&rest[..end])
}

#[cfg(test)]
mod tests {
    use RDKafkaErrorCode as C;

    use super::*;

    fn says(code: RDKafkaErrorCode, reason: &str, words: &[&str]) {
        let refusal = Refusal::of(&KafkaError::Global(code), reason).expect(reason);
        let text = format!("{}; {}", refusal.cause, refusal.remedy);
        for word in words {
            assert!(text.contains(word), "{reason}: {text:?} does not say {word:?}");
        }
    }

    #[test]
    fn each_refusal_has_a_cause_and_a_remedy_of_its_own() {
        let at = "sasl_ssl://h:9/bootstrap: ";
        says(
            C::Authentication,
            &format!(
                "{at}SASL authentication error: Authentication failed during authentication due to invalid credentials with SASL mechanism SCRAM-SHA-512 (after 2ms in state AUTH_REQ)"
            ),
            &[
                "the user is unknown or the password is wrong (SASL auth",
                "SCRAM-SHA-512);",
                "password=",
            ],
        );
        says(
            C::Authentication,
            &format!(
                "{at}SASL PLAIN mechanism handshake failed: Broker: Unsupported SASL mechanism: broker's supported mechanisms: SCRAM-SHA-256,SCRAM-SHA-512 (after 1ms in state AUTH_HANDSHAKE)"
            ),
            &["does not take this SASL mechanism, but SCRAM-SHA-256,SCRAM-SHA-512 (", "set sasl="],
        );
        says(
            C::SSL,
            &format!(
                "{at}SSL handshake failed: error:0A000086:SSL routines::certificate verify failed: broker certificate could not be verified"
            ),
            &["certificate is not valid here", "ca="],
        );
        says(
            C::SSL,
            &format!(
                "{at}error:0A000412:SSL routines::sslv3 alert bad certificate: SSL alert number 42"
            ),
            &["client's certificate", "cert= and key="],
        );
        says(C::TopicAuthorizationFailed, "", &["Topic authorization failed", "Describe"]);
        let creation = KafkaError::ClientCreation(
            "No provider for SASL mechanism GSSAPI: recompile librdkafka".into(),
        );
        let refusal = Refusal::of(&creation, "").expect("it stays");
        assert!(refusal.cause.contains("by SASL mechanism GSSAPI ("), "{refusal:?}");
    }

    #[test]
    fn what_may_pass_by_itself_is_no_refusal() {
        for code in [C::BrokerTransportFailure, C::OperationTimedOut, C::AllBrokersDown, C::Resolve]
        {
            let reason = "ssl://h:9/1: Connect to ipv4#127.0.0.1:9 failed: Connection refused";
            assert_eq!(Refusal::of(&KafkaError::Global(code), reason), None, "{code}");
        }
    }

    #[test]
    fn the_broker_is_found_in_a_reason() {
        assert_eq!(place("sasl_ssl://[::1]:92/bootstrap: gone"), Some("[::1]:92"));
        assert_eq!(place("1/1 brokers are down"), None);
    }
}
