//! Stores on files of a test's own.
#![allow(dead_code, reason = "each test file uses a part of it")]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use kafold_core::clock::SystemClock;
use kafold_embedded_store::{EmbeddedConfig, EmbeddedSource, EmbeddedStore};
use kafold_migrations::{Database, Mode, SqliteDatabase};
use tempfile::TempDir;

/// A folder with one log in it.
pub(crate) struct LogFolder(TempDir);

impl LogFolder {
    pub(crate) fn new() -> Self {
        Self(TempDir::new().expect("a temporary folder"))
    }

    pub(crate) fn file(&self) -> PathBuf {
        self.0.path().join("log.db")
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }
}

pub(crate) async fn database(file: &Path) -> SqliteDatabase {
    let url = format!("sqlite://{}", file.display());
    match Database::open(&url, Mode::Migrate).await.expect("opens") {
        Database::Sqlite(database) => database,
        Database::Postgres(_) => unreachable!("a SQLite URL"),
    }
}

pub(crate) async fn store_on(database: &SqliteDatabase) -> EmbeddedStore {
    let config = EmbeddedConfig::default();
    EmbeddedStore::open(database.clone(), config, Arc::new(SystemClock)).await.expect("opens")
}

pub(crate) async fn source_on(database: &SqliteDatabase) -> EmbeddedSource {
    EmbeddedSource::open(database.clone(), Arc::new(SystemClock)).await.expect("opens")
}
