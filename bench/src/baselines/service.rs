//! A service by hand: it keeps the states used last, reads the others from a table, as many in one query
//! as wait for it, and produces a record of what it decided. Nothing checks a version, nothing is indexed.

use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::sync::{Mutex, MutexGuard, PoisonError};

use kafold::digest::stream_hash;
use kafold::kafka::partitioner::partition_of;
use kafold::projections::sqlx::{self, PgPool};
use kafold::{Aggregate, StreamId, codec};
use lru::LruCache;
use tokio::sync::{mpsc, oneshot};

use crate::Failure;
use crate::baselines::producer::Events;
use crate::domain::{Account, AccountEvent, Deposit};
use crate::servers::PARTITIONS;

/// Streams that one query looks up at most, and as many wait for it.
const LOOK_UPS_MAX: usize = 256;
/// Events that are read of one stream at most.
const EVENTS_MAX: i64 = 64;

/// Who wants the state of a stream.
type Wanted = (String, oneshot::Sender<Result<Account, String>>);

/// The service.
pub struct Service {
    producer: Events,
    kept: Mutex<LruCache<String, Account>>,
    wanted: mpsc::Sender<Wanted>,
}

impl Service {
    /// Produces to the events topic of a log that is there and reads from an index.
    pub fn start(brokers: &str, log: &str, index: PgPool, kept: usize) -> Result<Self, Failure> {
        let (wanted, waiting) = mpsc::channel(LOOK_UPS_MAX);
        tokio::spawn(look_up(index, waiting));
        Ok(Self {
            producer: Events::start(brokers, log)?,
            kept: Mutex::new(LruCache::new(NonZeroUsize::new(kept).unwrap_or(NonZeroUsize::MIN))),
            wanted,
        })
    }

    /// One command.
    pub async fn deposit(&self, id: &str, command: &Deposit) -> Result<(), Failure> {
        let kept = self.kept().get(id).cloned();
        let mut account = match kept {
            Some(account) => account,
            None => {
                let (answer, account) = oneshot::channel();
                self.wanted.send((id.to_owned(), answer)).await?;
                account.await??
            }
        };
        for event in account.decide(command)? {
            account.evolve(&event);
            let stream = StreamId::new(Account::CATEGORY, id)?;
            self.producer.produce(&stream, &codec::encode(&event)?).await?;
        }
        self.kept().put(id.to_owned(), account);
        Ok(())
    }

    fn kept(&self) -> MutexGuard<'_, LruCache<String, Account>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Until the service is gone.
async fn look_up(index: PgPool, mut waiting: mpsc::Receiver<Wanted>) {
    let mut wanted = Vec::with_capacity(LOOK_UPS_MAX);
    while waiting.recv_many(&mut wanted, LOOK_UPS_MAX).await > 0 {
        let ids: Vec<_> = wanted.iter().map(|(id, _)| id.as_str()).collect();
        let found = states(&index, &ids).await.map_err(|error| error.to_string());
        for (id, answer) in wanted.drain(..) {
            let state = found.as_ref().map_err(Clone::clone);
            // Who stopped waiting needs no answer.
            let _ = answer.send(state.map(|states| states.get(&id).cloned().unwrap_or_default()));
        }
    }
}

async fn states(index: &PgPool, ids: &[&str]) -> Result<HashMap<String, Account>, Failure> {
    let sql = "SELECT e.stream_id, e.payload \
               FROM UNNEST($1::text[], $3::int4[], $4::int8[]) AS w (id, partition, hash), \
               LATERAL (SELECT stream_id, version, payload FROM kafold_event e \
                 WHERE e.partition = w.partition AND e.hash = w.hash AND category = 'account' \
                   AND stream_id = w.id ORDER BY version LIMIT $2) e \
               ORDER BY e.stream_id, e.version";
    let streams = ids.iter().map(|id| StreamId::new("account", id));
    let streams = streams.collect::<Result<Vec<_>, _>>()?;
    let partition = |stream| partition_of(stream, PARTITIONS).0 as i32;
    let partitions: Vec<_> = streams.iter().map(partition).collect();
    let hashes: Vec<_> = streams.iter().map(stream_hash).collect();
    let query = sqlx::query_as(sql).bind(ids).bind(EVENTS_MAX).bind(partitions).bind(hashes);
    let rows: Vec<(String, Vec<u8>)> = query.fetch_all(index).await?;
    let mut states: HashMap<String, Account> = HashMap::new();
    for (id, payload) in rows {
        let event: AccountEvent = codec::decode("account.deposited.v1", &payload)?;
        states.entry(id).or_default().evolve(&event);
    }
    Ok(states)
}
