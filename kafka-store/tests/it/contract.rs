//! The contract suite on a real broker, all claims on one topic.

use crate::support;

use std::sync::Arc;

use async_trait::async_trait;
use kafold_core::EventSource;
use kafold_core::EventStore;
use kafold_core::memory::MemoryIndex;
use kafold_core::store::Cursor;
use kafold_core::testing::StoreUnderTest;
use kafold_kafka_store::{KafkaConfig, KafkaStore};
use tokio::sync::{Mutex, MutexGuard};

/// Claims run one after another: each opens the one topic anew, and the newest start would take the
/// partitions from the claim before.
static ONE_AT_A_TIME: Mutex<()> = Mutex::const_new(());
/// The topic of this run.
static NAME: std::sync::OnceLock<String> = std::sync::OnceLock::new();

struct OnKafka {
    config: KafkaConfig,
    index: Arc<MemoryIndex>,
    store: Arc<KafkaStore>,
    _turn: MutexGuard<'static, ()>,
}

async fn make(claim: &'static str) -> Option<OnKafka> {
    let brokers = support::brokers(claim)?;
    let turn = ONE_AT_A_TIME.lock().await;
    let name = NAME.get_or_init(|| support::new_name("contract"));
    let config = support::config(&brokers, name, "partitions=3");
    let index = Arc::new(MemoryIndex::new());
    let store = support::open_with(config.clone(), index.clone(), claim).await;
    support::ready(&store).await;
    Some(OnKafka { config, index, store: Arc::new(store), _turn: turn })
}

#[async_trait]
impl StoreUnderTest for OnKafka {
    fn store(&self) -> Arc<dyn EventStore> {
        self.store.clone()
    }

    fn source(&self) -> Arc<dyn EventSource> {
        Arc::new(self.store.source())
    }

    async fn reopen(&mut self) -> bool {
        self.store.shutdown().await;
        let store = support::open_with(self.config.clone(), self.index.clone(), "reopened").await;
        support::ready(&store).await;
        self.store = Arc::new(store);
        true
    }

    async fn cursor_of_another_log(&self) -> Cursor {
        let log = r#"{"nonce":1,"partitions":3}"#;
        let claim = r#"{"epoch":1,"nonce":1}"#;
        let state = format!(
            r#"{{"log":{log},"claim":{claim},"next_seq":1,"anchor":{{"offset":0,"claim":{claim},"seq":0}},"commands_mark":0}}"#
        );
        Cursor { next: kafold_core::Offset(1), state }
    }

    fn too_large_bytes(&self) -> Option<usize> {
        Some(1_048_588)
    }
}

kafold_core::store_contract!(make);
