//! Either kind of log behind one handle.

use std::fmt;
use std::sync::Arc;

use kafold_core::clock::{RandomIds, SystemClock};
use kafold_core::forward::Node;
use kafold_core::store::{Health, Owner};
use kafold_core::{Clock, CommandBus, EventSource, EventStore, IdGenerator};

#[cfg(feature = "embedded")]
use kafold_embedded_store::{EmbeddedConfig, EmbeddedSource, EmbeddedStore};
#[cfg(feature = "kafka")]
use kafold_kafka_store::{KafkaConfig, KafkaSource, KafkaStore};
#[cfg(any(feature = "embedded", feature = "projections"))]
use kafold_migrations::Database;

use crate::error::OpenError;
use crate::reader::LogReader;

/// Opens a log by its URL, with the defaults of [`LogOptions`].
pub async fn open_log(url: &str) -> Result<Log, OpenError> {
    LogOptions::new(url).open().await
}

/// How a log is opened.
#[derive(Clone)]
pub struct LogOptions {
    url: String,
    #[cfg(feature = "projections")]
    index: Option<Database>,
    owner: Owner,
    clock: Arc<dyn Clock>,
    ids: Arc<dyn IdGenerator>,
}

impl fmt::Debug for LogOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LogOptions")
            .field("url", &shown_url(&self.url))
            .field("owner", &self.owner)
            .finish()
    }
}

impl LogOptions {
    /// The log at `sqlite://FILE`, which is created when absent, or at
    /// `kafka://HOST:PORT[,HOST:PORT]/NAME`, whose topics are created when absent with
    /// `?partitions=N&replication=R` (12 partitions, 3 replicas or as many as there are brokers).
    pub fn new(url: impl Into<String>) -> Self {
        let clock = Arc::new(SystemClock);
        let owner = Owner { name: node_name(), address: String::new(), started_at: clock.now() };
        Self {
            url: url.into(),
            #[cfg(feature = "projections")]
            index: None,
            owner,
            clock,
            ids: Arc::new(RandomIds),
        }
    }

    /// Keeps the stream index of a log on Kafka in this database, so that a start reads only the end
    /// of the log. Without it the index is in memory and a start reads the whole log. A log in a
    /// SQLite file needs none.
    #[cfg(feature = "projections")]
    pub fn index(mut self, database: &Database) -> Self {
        self.index = Some(database.clone());
        self
    }

    /// Sets the name of this process in claims and for operators. Default: the host's name and the
    /// process id.
    pub fn node_name(mut self, name: impl Into<String>) -> Self {
        self.owner.name = name.into();
        self
    }

    /// Sets the address at which others reach this process, for claims and for operators. Default: none.
    pub fn address(mut self, address: impl Into<String>) -> Self {
        self.owner.address = address.into();
        self
    }

    /// Tells the time and draws ids with these instead of the machine's own.
    pub fn clock(mut self, clock: Arc<dyn Clock>, ids: Arc<dyn IdGenerator>) -> Self {
        self.owner.started_at = clock.now();
        (self.clock, self.ids) = (clock, ids);
        self
    }

    /// Returns the clock and the source of ids.
    #[cfg(feature = "projections")]
    pub(crate) fn clock_and_ids(&self) -> (Arc<dyn Clock>, Arc<dyn IdGenerator>) {
        (Arc::clone(&self.clock), Arc::clone(&self.ids))
    }

    /// Returns the name of this process.
    #[cfg(feature = "projections")]
    pub(crate) fn name(&self) -> &str {
        &self.owner.name
    }

    /// Returns `true` if the log has no file of its own.
    #[cfg(feature = "projections")]
    pub(crate) fn needs_database(&self) -> bool {
        self.url.starts_with("kafka://")
    }

    /// Opens it. After [`OpenError::Unavailable`] the caller waits and tries again.
    pub async fn open(self) -> Result<Log, OpenError> {
        match self.url.split_once("://").map(|(scheme, _)| scheme) {
            #[cfg(feature = "embedded")]
            Some("sqlite") => self.open_embedded().await,
            #[cfg(feature = "kafka")]
            Some("kafka") => self.open_kafka().await,
            #[cfg(not(feature = "embedded"))]
            Some("sqlite") => Err(OpenError::Feature { log: "SQLite", feature: "embedded" }),
            #[cfg(not(feature = "kafka"))]
            Some("kafka") => Err(OpenError::Feature { log: "Kafka", feature: "kafka" }),
            _ => Err(OpenError::Url { url: shown_url(&self.url) }),
        }
    }

    /// Opens the log read-only, for a process with projections alone. Creates nothing: an absent
    /// topic is [`OpenError::Unavailable`], and an absent file is refused.
    pub async fn open_reader(self) -> Result<LogReader, OpenError> {
        LogReader::open(&self.url, self.clock).await
    }

    #[cfg(feature = "embedded")]
    async fn open_embedded(self) -> Result<Log, OpenError> {
        use kafold_migrations::{DatabaseError, Mode};
        let refused = |error: DatabaseError| {
            OpenError::of(matches!(error, DatabaseError::Unavailable { .. }), error)
        };
        let unread = |error: kafold_core::ReadError| {
            OpenError::of(matches!(error, kafold_core::ReadError::Unavailable { .. }), error)
        };
        let database = Database::open(&self.url, Mode::Migrate).await.map_err(refused)?;
        let Database::Sqlite(file) = &database else {
            return Err(OpenError::Url { url: shown_url(&self.url) });
        };
        let config = EmbeddedConfig::default();
        let store =
            EmbeddedStore::open(file.clone(), config, self.clock.clone()).await.map_err(unread)?;
        let source = EmbeddedSource::open(file.clone(), self.clock).await.map_err(unread)?;
        Ok(Log {
            kind: Kind::Embedded {
                store: Arc::new(store),
                source: Arc::new(source),
                database,
                node: Node::only(self.owner),
            },
            #[cfg(feature = "projections")]
            index: None,
        })
    }

    #[cfg(feature = "kafka")]
    async fn open_kafka(self) -> Result<Log, OpenError> {
        use kafold_core::StreamIndex;
        use kafold_core::memory::MemoryIndex;
        let refused =
            |error: kafold_kafka_store::OpenError| OpenError::of(error.is_transient(), error);
        let config: KafkaConfig = self
            .url
            .parse()
            .map_err(|error: kafold_kafka_store::ConfigError| OpenError::of(false, error))?;
        #[cfg(feature = "projections")]
        if let Some(database) = &self.index {
            use kafold_migrations::{DatabaseError, rights::Role};
            database.require(Role::Service).await.map_err(|error| {
                OpenError::of(matches!(error, DatabaseError::Unavailable { .. }), error)
            })?;
        }
        #[cfg(feature = "projections")]
        let index: Arc<dyn StreamIndex> = match self.index.clone() {
            Some(database) => Arc::new(kafold_projections::SqlIndex::new(database)),
            None => Arc::new(MemoryIndex::default()),
        };
        #[cfg(not(feature = "projections"))]
        let index: Arc<dyn StreamIndex> = Arc::new(MemoryIndex::default());
        let store = KafkaStore::open(config, index, self.owner, self.clock, self.ids)
            .await
            .map_err(refused)?;
        let source = Arc::new(store.source());
        Ok(Log {
            kind: Kind::Kafka { store: Arc::new(store), source },
            #[cfg(feature = "projections")]
            index: self.index,
        })
    }
}

/// An open log. Cheap to clone.
#[derive(Clone)]
pub struct Log {
    kind: Kind,
    /// The database of the stream index.
    #[cfg(feature = "projections")]
    index: Option<Database>,
}

#[derive(Clone)]
enum Kind {
    #[cfg(feature = "embedded")]
    Embedded {
        store: Arc<EmbeddedStore>,
        source: Arc<EmbeddedSource>,
        database: Database,
        node: Node,
    },
    #[cfg(feature = "kafka")]
    Kafka { store: Arc<KafkaStore>, source: Arc<KafkaSource> },
}

impl fmt::Debug for Log {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match &self.kind {
            #[cfg(feature = "embedded")]
            Kind::Embedded { .. } => "Log(embedded)",
            #[cfg(feature = "kafka")]
            Kind::Kafka { .. } => "Log(kafka)",
        })
    }
}

impl Log {
    /// Where commands append and streams are read.
    pub fn store(&self) -> Arc<dyn EventStore> {
        match &self.kind {
            #[cfg(feature = "embedded")]
            Kind::Embedded { store, .. } => store.clone(),
            #[cfg(feature = "kafka")]
            Kind::Kafka { store, .. } => store.clone(),
        }
    }

    /// Where projections read everything.
    pub fn source(&self) -> Arc<dyn EventSource> {
        match &self.kind {
            #[cfg(feature = "embedded")]
            Kind::Embedded { source, .. } => source.clone(),
            #[cfg(feature = "kafka")]
            Kind::Kafka { source, .. } => source.clone(),
        }
    }

    /// The log's own file, where read models may live too; `None` on Kafka.
    #[cfg(any(feature = "embedded", feature = "projections"))]
    pub fn database(&self) -> Option<&Database> {
        match &self.kind {
            #[cfg(feature = "embedded")]
            Kind::Embedded { database, .. } => Some(database),
            #[cfg(feature = "kafka")]
            Kind::Kafka { .. } => None,
        }
    }

    /// Carries commands to the node that owns their stream, for
    /// [`CommandHandler::forwarding`](kafold_core::CommandHandler::forwarding); `None` where there is
    /// one process only.
    pub fn commands(&self) -> Option<Arc<dyn CommandBus>> {
        match &self.kind {
            #[cfg(feature = "embedded")]
            Kind::Embedded { .. } => None,
            #[cfg(feature = "kafka")]
            Kind::Kafka { store, .. } => Some(store.commands()),
        }
    }

    /// The nodes of the service, this one first, and which partitions each owns. Those that another
    /// one has not heard of for 10 s are left out.
    pub fn nodes(&self) -> Vec<Node> {
        match &self.kind {
            #[cfg(feature = "embedded")]
            Kind::Embedded { node, .. } => vec![node.clone()],
            #[cfg(feature = "kafka")]
            Kind::Kafka { store, .. } => store.nodes(),
        }
    }

    /// How many partitions the log has.
    pub fn partitions(&self) -> u32 {
        match &self.kind {
            #[cfg(feature = "embedded")]
            Kind::Embedded { .. } => 1,
            #[cfg(feature = "kafka")]
            Kind::Kafka { store, .. } => store.partitions(),
        }
    }

    /// Returns the brokers' refusals, one sentence each with cause and remedy. A refusal lasts
    /// until an operator acts. A starting program ends with the refusal; a running program is not
    /// ready.
    pub fn refusals(&self) -> Vec<String> {
        match &self.kind {
            #[cfg(feature = "embedded")]
            Kind::Embedded { .. } => Vec::new(),
            #[cfg(feature = "kafka")]
            Kind::Kafka { store, .. } => store.refusals(),
        }
    }

    /// Returns `Ready` while commands are accepted; otherwise the reasons, such as a right which the
    /// login lacks in the database of the stream index.
    pub fn health(&self) -> Health {
        let health = self.store().health();
        #[cfg(feature = "projections")]
        if let Some(complaint) = self.index.as_ref().and_then(Database::complaint) {
            let mut reasons = match health {
                Health::Ready => Vec::new(),
                Health::NotReady(reasons) => reasons,
            };
            reasons.push(format!("the database refuses: {complaint}"));
            return Health::NotReady(reasons);
        }
        health
    }

    /// Takes no more commands, settles what is pending, hands the index what it lacks; bounded in
    /// time.
    pub async fn close(self) {
        match self.kind {
            #[cfg(feature = "embedded")]
            Kind::Embedded { store, .. } => store.close().await,
            #[cfg(feature = "kafka")]
            Kind::Kafka { store, .. } => store.shutdown().await,
        }
    }
}

/// Returns the URL of a log or a database in printable form: scheme, hosts and name, without login
/// and options, which may hold a password. `…` replaces any part which may be a password.
pub fn shown_url(url: &str) -> String {
    let Some((scheme, rest)) = url.split_once("://") else { return "…".to_owned() };
    if !scheme.bytes().all(|b| b.is_ascii_lowercase()) {
        return "…".to_owned();
    }
    let (place, options) = rest.split_once('?').unwrap_or((rest, ""));
    if scheme == "sqlite" {
        return format!("sqlite://{place}");
    }
    let place = place.rsplit_once('@').map_or(place, |(_, place)| place);
    let (hosts, name) = place.split_once('/').map_or((place, None), |(h, name)| (h, Some(name)));
    let is_host = |host: &str| {
        let (name, port) = host.rsplit_once(':').unwrap_or((host, ""));
        let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_.:[]%".contains(c);
        name.chars().all(is_plain) && port.bytes().all(|b| b.is_ascii_digit())
    };
    // A `?` in a password without percent-encoding splits the login.
    let mut logins = options.match_indices('@').map(|(at, _)| &options[..at]);
    let is_login_cut = logins.any(|before| !before.ends_with('='));
    let is_name = |name: &str| !name.contains(['=', '&', '@']);
    match hosts.split(',').all(is_host) && !is_login_cut && name.is_none_or(is_name) {
        true => format!("{scheme}://{place}"),
        false => format!("{scheme}://…"),
    }
}

fn node_name() -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname");
    let host = host.ok().or_else(|| std::env::var("HOSTNAME").ok()).unwrap_or_default();
    match host.trim() {
        "" => format!("pid-{}", std::process::id()),
        host => format!("{host}-{}", std::process::id()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_is_shown_without_login_and_options() {
        for (url, shown) in [
            ("kafka://a:1,[::1]:2/o?password=hunter2", "kafka://a:1,[::1]:2/o"),
            ("kafka://a:1/o?password=@/run/x", "kafka://a:1/o"),
            ("kafka://u:hunter2@a:1/o", "kafka://a:1/o"),
            ("postgres://u:hunter2@h/d", "postgres://h/d"),
            ("postgres://u:hun@ter2@h/d", "postgres://h/d"),
            ("postgres://u:a?hunter2@h/d", "postgres://…"),
            ("postgres://u:1?hunter2@h/d", "postgres://…"),
            ("kafka://a:1/o&password=hunter2", "kafka://…"),
            ("hunter2", "…"),
            ("HUNTER2://a", "…"),
            ("sqlite://a@b.db?mode=ro", "sqlite://a@b.db"),
        ] {
            assert_eq!(shown_url(url), shown, "{url}");
        }
    }

    #[test]
    fn options_show_no_password() {
        let options = LogOptions::new("kafka://u:hunter2@a:1/o?password=hunter2");
        assert!(!format!("{options:?}").contains("hunter2"), "{options:?}");
    }
}
