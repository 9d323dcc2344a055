//! `doctor --as ROLE`: probes each right of a role, as the user of the URL.

use kafold::kafka::rights::Answer;
use kafold::rights::Role;

use super::Checks;
use crate::admin::Context;
use crate::commands::acl::on_kafka;
use crate::error::Error;
use crate::log::operator;
use crate::options::LogUrl;

const NAME: &str = "rights: kafka";

/// Probes the rights on the topics, the groups and the cluster.
pub(super) async fn check_kafka(context: &Context, url: &LogUrl, role: Role, checks: &mut Checks) {
    let LogUrl::Kafka(log) = url else { return };
    let role = on_kafka(role);
    let tried = async {
        let operator = operator(url, &context.clock).await?;
        Ok::<_, Error>(operator.try_rights(role).await?)
    };
    let tried = match tried.await {
        Ok(tried) => tried,
        Err(error) => return checks.failed(NAME, &error),
    };
    for (right, answer) in tried {
        match (answer, right.without) {
            (Answer::Granted, _) => checks.ok(NAME, right.to_string()),
            (Answer::Missing, None) => {
                let found = format!("{right} is missing for this user");
                checks.problem(NAME, found, right.remedy(log, role));
            }
            (Answer::Missing, Some(without)) => {
                let found = format!("{right} is missing for this user: {without}");
                checks.warning(NAME, found, right.remedy(log, role));
            }
            (Answer::NoTopic(topic), _) => {
                let found = format!("{right} could not be tried: there is no topic {topic}");
                checks.problem(NAME, found, "make the topic with `topic create`");
            }
            (Answer::Untried(why), _) => {
                let found = format!("{right} could not be tried: {why}");
                let remedy = "see that every broker is up";
                checks.problem(NAME, found, remedy);
            }
        }
    }
}
