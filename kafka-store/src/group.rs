//! Members of the log's consumer groups that are no part of this service.
//!
//! The group protocol spreads partitions over all members of a group, whatever program they run and
//! whatever database they write. A partition that goes to another program is served by nobody, and two
//! nodes with different databases each index a part of the log. So every member of this service has a
//! client id with the identity of its database, by which the others recognise it.

use std::sync::Arc;
use std::time::Duration;

use kafold_core::Clock;
use kafold_core::digest::Digest;
use rdkafka::error::{KafkaError, KafkaResult};

use crate::client::{Group, GroupMember, Inquirer};
use crate::guard::Refusals;
use crate::membership::Denials;

/// The client id of a member without a database, and the first word of every other.
const CLIENT_ID: &str = "kafold";
/// Interval of the looks at the members of a group. A foreign member is named within this and the
/// time of a request.
const LOOK_INTERVAL: Duration = Duration::from_secs(10);
/// Delay of the first look: the start has priority.
const LOOK_DELAY: Duration = Duration::from_secs(2);
/// Interval of the looks of a start that waits for a node with another database to leave.
const LEAVE_POLL: Duration = Duration::from_millis(500);
/// Longest wait for the brokers' answer.
const TIMEOUT: Duration = Duration::from_secs(2);
/// Most members named in one complaint; the complaint counts the others.
const NAMED_MAX: usize = 3;

/// Returns a short text for the identity of a database, for names of groups and clients.
pub(crate) fn short(database: &str) -> String {
    // The upper half of a hash is a hash.
    format!("{:08x}", Digest::of_parts([database.as_bytes()]).0 >> u32::BITS)
}

/// Returns the client id of a member whose state is in this database.
pub(crate) fn client_id(database: Option<&str>) -> String {
    database.map_or(CLIENT_ID.to_owned(), |database| format!("{CLIENT_ID}.{}", short(database)))
}

/// The relation of a member of a group to this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kin {
    Ours,
    /// A node of the same log with another database.
    OtherDatabase,
    /// Another program.
    Foreign,
}

fn database_of(client_id: &str) -> Option<&str> {
    client_id.strip_prefix(CLIENT_ID)?.strip_prefix('.')
}

fn kin(own: &str, client_id: &str) -> Kin {
    match (database_of(own), database_of(client_id)) {
        (Some(own), Some(other)) if own != other => Kin::OtherDatabase,
        // A member without a database shares none, and takes none from the others.
        (_, Some(_)) => Kin::Ours,
        (_, None) if client_id == CLIENT_ID => Kin::Ours,
        (_, None) => Kin::Foreign,
    }
}

/// Returns one sentence about the members of a group that are no part of this service; `None` if all
/// are.
fn complaint(group: &Group, own: &str) -> Option<String> {
    let Group { name, members, is_of_new_protocol } = group;
    let of = |wanted| members.iter().filter(move |member| kin(own, &member.client_id) == wanted);
    let named = |wanted| {
        let named: Vec<_> = of(wanted).take(NAMED_MAX).map(ToString::to_string).collect();
        let more = of(wanted).count().saturating_sub(NAMED_MAX);
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        format!("{}{more}", named.join(", "))
    };
    if of(Kin::OtherDatabase).next().is_some() {
        let others = named(Kin::OtherDatabase);
        return Some(format!(
            "group {name} is shared with a node that writes another database: {others}; {REMEDY}"
        ));
    }
    let foreign = match is_of_new_protocol {
        true => "a consumer with group.protocol=consumer".to_owned(),
        false => of(Kin::Foreign).next().map(|_| named(Kin::Foreign))?,
    };
    Some(format!(
        "group {name} is shared with another program: {foreign}; nobody serves the partitions that the \
         group gives to it: stop it, or give it a group of its own"
    ))
}

/// The remedy for two nodes with different databases.
pub(crate) const REMEDY: &str = "stop one of the two, or give both the same database";

/// Requests the members of one group from the brokers.
pub(crate) struct GroupMembers {
    inquirer: Arc<Inquirer>,
    clock: Arc<dyn Clock>,
    group: String,
    own: String,
}

impl GroupMembers {
    /// `database` is the identity of the database with the state that members of the group share.
    pub(crate) fn new(
        inquirer: &Arc<Inquirer>,
        clock: &Arc<dyn Clock>,
        group: &str,
        database: Option<&str>,
    ) -> Self {
        let (inquirer, clock) = (Arc::clone(inquirer), Arc::clone(clock));
        Self { inquirer, clock, group: group.to_owned(), own: client_id(database) }
    }

    /// Returns the member with another database that has not left within `patience`: the members of
    /// a killed node stay in the group until their session ends.
    pub(crate) async fn with_other_database(&self, patience: Duration) -> Option<GroupMember> {
        let deadline = self.clock.instant() + patience;
        loop {
            let other = match self.look().await {
                Ok(group) => (group?.members.into_iter())
                    .find(|member| kin(&self.own, &member.client_id) == Kin::OtherDatabase)?,
                Err(error) => {
                    tracing::debug!(group = self.group, %error, "cannot look up the members");
                    return None;
                }
            };
            if self.clock.instant() >= deadline {
                return Some(other);
            }
            self.clock.sleep(LEAVE_POLL).await;
        }
    }

    /// Reports members that are no part of this service, as long as they are there. Ends with the
    /// task only.
    ///
    /// Of two nodes with different databases that have joined at the same moment one has a complaint
    /// in `refusals`, which ends a starting program.
    pub(crate) async fn watch(self, Denials { refusals, strangers, .. }: Denials) {
        let what = format!("members of group {}", self.group);
        let told = Told { refusals, strangers, what };
        self.clock.sleep(LOOK_DELAY).await;
        loop {
            match self.look().await {
                Ok(group) => told.follow(group.as_ref(), &self.own),
                Err(error) => {
                    tracing::debug!(group = self.group, %error, "cannot look up the members");
                }
            }
            self.clock.sleep(LOOK_INTERVAL).await;
        }
    }

    async fn look(&self) -> KafkaResult<Option<Group>> {
        let (inquirer, group) = (Arc::clone(&self.inquirer), self.group.clone());
        let asked = tokio::task::spawn_blocking(move || inquirer.group(&group, TIMEOUT)).await;
        asked.unwrap_or_else(|error| Err(KafkaError::ClientCreation(error.to_string())))
    }
}

/// Returns whether a node with another database precedes this one: the smaller identity stays.
fn yields(group: &Group, own: &str) -> bool {
    let mut members = group.members.iter().map(|member| member.client_id.as_str());
    members.any(|other| kin(own, other) == Kin::OtherDatabase && other < own)
}

/// Withdraws the complaint when the watch ends.
struct Told {
    refusals: Arc<Refusals>,
    strangers: Arc<Refusals>,
    what: String,
}

impl Told {
    fn follow(&self, group: Option<&Group>, own: &str) {
        let complaint = group.and_then(|group| Some((group, complaint(group, own)?)));
        let Some((group, complaint)) = complaint else { return self.withdraw() };
        let (place, other) = match yields(group, own) {
            true => (&self.refusals, &self.strangers),
            false => (&self.strangers, &self.refusals),
        };
        other.clear(&self.what, "");
        // The members may have changed.
        place.replace(&self.what, complaint);
    }

    fn withdraw(&self) {
        self.refusals.clear(&self.what, "");
        self.strangers.clear(&self.what, "");
    }
}

impl Drop for Told {
    fn drop(&mut self) {
        self.withdraw();
    }
}

/// Returns one sentence for each group with members that are no part of the service with this database.
/// Without a database, nodes with different databases are compared with each other.
pub(crate) fn complaints(groups: &[Group], database: Option<&str>) -> Vec<String> {
    let given = database.map(|database| client_id(Some(database)));
    let complaint = |group: &Group| {
        let ids = || group.members.iter().map(|member| member.client_id.as_str());
        // The projections of each database have groups of their own.
        let is_of_database = ids().filter_map(database_of).any(|id| group.name.contains(id));
        let given = given.as_deref().filter(|_| !is_of_database);
        if let Some(own) = given
            && ids().next().is_some()
            && ids().all(|id| kin(own, id) == Kin::OtherDatabase)
        {
            let (name, node) = (&group.name, &group.members[0]);
            return Some(format!(
                "the nodes of group {name} write another database than the given one ({node}): give the \
                 database of the nodes"
            ));
        }
        let first = || ids().find(|id| kin(CLIENT_ID, id) == Kin::Ours).unwrap_or(CLIENT_ID);
        complaint(group, given.unwrap_or_else(first))
    };
    groups.iter().filter_map(complaint).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(client_id: &str, host: &str) -> GroupMember {
        GroupMember { client_id: client_id.into(), host: host.into() }
    }

    #[test]
    fn members_are_recognised_by_their_client_id() {
        let (one, other) = (client_id(Some("1.2.public")), client_id(Some("1.3.public")));
        assert_ne!(one, other);
        for (own, client, expected) in [
            (one.as_str(), one.as_str(), Kin::Ours),
            (&one, &other, Kin::OtherDatabase),
            (&one, CLIENT_ID, Kin::Ours),
            (CLIENT_ID, &one, Kin::Ours),
            (CLIENT_ID, CLIENT_ID, Kin::Ours),
            (&one, "rdkafka", Kin::Foreign),
            (&one, "kafolded", Kin::Foreign),
            (&one, "", Kin::Foreign),
            (CLIENT_ID, "console-consumer", Kin::Foreign),
        ] {
            assert_eq!(kin(own, client), expected, "{own} beside {client}");
        }
    }

    fn group(members: Vec<GroupMember>) -> Group {
        Group { name: "g".into(), members, is_of_new_protocol: false }
    }

    #[test]
    fn a_group_names_the_members_that_are_not_of_this_service() {
        let (own, other) = (client_id(Some("a")), client_id(Some("b")));
        let ours = member(&own, "10.0.0.1");
        let mut shared = group(vec![ours]);
        assert_eq!(complaint(&shared, &own), None);
        shared.members.extend((2..7).map(|host| member("rdkafka", &format!("10.0.0.{host}"))));
        let text = complaint(&shared, &own).expect("foreign members");
        let named = "group g is shared with another program: rdkafka at 10.0.0.2, rdkafka at \
                     10.0.0.3, rdkafka at 10.0.0.4 and 2 more; ";
        assert!(text.starts_with(named), "{text}");
        assert!(!yields(&shared, &own));
        shared.members.push(member(&other, "10.0.0.9"));
        let text = complaint(&shared, &own).expect("another database");
        assert!(text.contains("writes another database") && text.contains("10.0.0.9"), "{text}");
        assert_ne!(yields(&shared, &own), yields(&shared, &other), "one of the two stays");
        assert_eq!(complaints(&[shared], None), [text]);
        let opaque = Group { is_of_new_protocol: true, ..group(Vec::new()) };
        let text = complaint(&opaque, &own).expect("a member that is not shown");
        assert!(text.contains("group.protocol=consumer"), "{text}");
        let worker = group(vec![member(&other, "10.0.0.9")]);
        let none = Vec::<String>::new();
        assert_eq!(complaints(std::slice::from_ref(&worker), None), none, "no database is given");
        assert_eq!(complaints(std::slice::from_ref(&worker), Some("b")), none);
        let given = complaints(std::slice::from_ref(&worker), Some("a"));
        assert!(
            given.len() == 1 && given[0].contains("another database than the given"),
            "{given:?}"
        );
        let projection = Group { name: format!("sums.{}", short("b")), ..worker };
        assert_eq!(
            complaints(&[projection], Some("a")),
            none,
            "each database has a group of its own"
        );
    }
}
