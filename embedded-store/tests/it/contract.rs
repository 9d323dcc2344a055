//! The promises of every store, on a SQLite file.

use crate::common;

use std::sync::Arc;

use async_trait::async_trait;
use kafold_core::store::Cursor;
use kafold_core::testing::StoreUnderTest;
use kafold_core::{EventSource, EventStore, Offset};
use kafold_embedded_store::{EmbeddedConfig, EmbeddedSource, EmbeddedStore};
use kafold_migrations::Database;

use common::{LogFolder, database, source_on, store_on};

struct Embedded {
    folder: LogFolder,
    open: Option<(EmbeddedStore, EmbeddedSource)>,
}

impl Embedded {
    async fn open(&mut self) {
        let database = database(&self.folder.file()).await;
        self.open = Some((store_on(&database).await, source_on(&database).await));
    }
}

#[async_trait]
impl StoreUnderTest for Embedded {
    fn store(&self) -> Arc<dyn EventStore> {
        Arc::new(self.open.as_ref().expect("open").0.clone())
    }

    fn source(&self) -> Arc<dyn EventSource> {
        Arc::new(self.open.as_ref().expect("open").1.clone())
    }

    async fn reopen(&mut self) -> bool {
        let (store, source) = self.open.take().expect("open");
        store.close().await;
        drop((store, source));
        Database::Sqlite(database(&self.folder.file()).await).close().await;
        self.open().await;
        true
    }

    async fn cursor_of_another_log(&self) -> Cursor {
        Cursor { next: Offset(0), state: "00000000000000000000000000000000".into() }
    }

    fn too_large_bytes(&self) -> Option<usize> {
        Some(EmbeddedConfig::default().event_bytes_max + 1)
    }
}

async fn make(_claim: &'static str) -> Option<Embedded> {
    let mut embedded = Embedded { folder: LogFolder::new(), open: None };
    embedded.open().await;
    Some(embedded)
}

kafold_core::store_contract!(make);
