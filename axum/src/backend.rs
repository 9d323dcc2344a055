//! [`Backend`]: what a running service opens, watches and closes.

use std::future::IntoFuture;

use async_trait::async_trait;
use kafold::forward::Node;
use kafold::store::Health;
use kafold::{Kafold, LogReader, OpenError, OpenedLog, Opening, OpeningReader};

/// Log and database of a running service: a [`Kafold`], or parts that a program composes itself.
#[async_trait]
pub trait Backend: Send + Sync + 'static {
    /// Returns `Ready`, or every reason why not, for `/health/ready`. Answers within seconds.
    async fn health(&self) -> Health;

    /// Returns the refusals of brokers, such as a missing right. A refusal within seconds after the start
    /// ends the program.
    fn refusals(&self) -> Vec<String>;

    /// Measures what `/metrics` shows, such as the lag of projections.
    fn measure(&self);

    /// Returns the nodes of the service, this one first, and the number of partitions; `None` for a process
    /// that owns no partitions.
    fn nodes(&self) -> Option<(Vec<Node>, u32)>;

    /// Settles what is pending and closes log and database.
    async fn close(&self);
}

#[async_trait]
impl<L: OpenedLog> Backend for Kafold<L> {
    async fn health(&self) -> Health {
        self.check().await
    }

    fn refusals(&self) -> Vec<String> {
        self.log().refusals()
    }

    fn measure(&self) {
        // The lag is measured when the health is read.
        Self::health(self);
    }

    fn nodes(&self) -> Option<(Vec<Node>, u32)> {
        Some((self.log().nodes()?, self.log().partitions()))
    }

    async fn close(&self) {
        self.clone().close().await;
    }
}

/// Opens a [`Backend`]. [`Opening`] opens a [`Kafold`], and [`OpeningReader`] one without commands.
pub trait Open: Send + Sync {
    /// The opened backend.
    type Backend: Backend + Clone;

    /// Tries once to open log and database. `address` is the URL at which others reach this process. A
    /// [transient](OpenError::is_transient) error is tried again, any other error ends the program.
    fn open(&self, address: &str) -> impl Future<Output = Result<Self::Backend, OpenError>> + Send;
}

impl Open for Opening {
    type Backend = Kafold;

    fn open(&self, address: &str) -> impl Future<Output = Result<Kafold, OpenError>> + Send {
        self.clone().address(address).into_future()
    }
}

impl Open for OpeningReader {
    type Backend = Kafold<LogReader>;

    fn open(
        &self,
        address: &str,
    ) -> impl Future<Output = Result<Kafold<LogReader>, OpenError>> + Send {
        self.clone().address(address).into_future()
    }
}
