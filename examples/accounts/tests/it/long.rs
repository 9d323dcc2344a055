//! The guide's chapter on snapshots.

use kafold::SnapshotSchema;
use kafold::prelude::*;
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, DomainEvent, Serialize, Deserialize)]
#[event(category = "account")]
enum AccountEvent {
    #[event("account.deposited")]
    Deposited { cents: u32 },
}

#[derive(Clone, Default, Serialize, Deserialize)]
struct Account {
    balance: i64,
}

impl Aggregate for Account {
    const SNAPSHOT: Option<SnapshotSchema<Self>> = Some(SnapshotSchema::new("account.1"));
    type Command = u32;
    type Event = AccountEvent;
    type Error = Never;

    fn decide(&self, &cents: &u32) -> Result<Vec<AccountEvent>, Never> {
        Ok(vec![AccountEvent::Deposited { cents }])
    }

    fn evolve(&mut self, AccountEvent::Deposited { cents }: &AccountEvent) {
        self.balance += i64::from(*cents);
    }
}

#[derive(Debug, PartialEq, Serialize, Deserialize, thiserror::Error)]
#[error("no rule refuses a deposit")]
struct Never;

#[tokio::test]
async fn a_long_stream_is_loaded_from_its_snapshot() -> Result<(), Box<dyn std::error::Error>> {
    let folder = tempfile::tempdir()?;
    let url = format!("sqlite://{}", folder.path().join("accounts.db").display());
    let kafold = kafold::open(&url).await?;
    let accounts = kafold.handler::<Account>();
    for _ in 0..300 {
        accounts.handle("ada", &1).await?;
    }
    kafold.close().await;

    let kafold = kafold::open(&url).await?;
    let (account, version) = kafold.handler::<Account>().load("ada").await?;
    assert_eq!((account.balance, version.0), (300, 300));
    kafold.close().await;
    Ok(())
}
