//! Accounts: deposits, withdrawals with one rule, and the balance of each account.

use axum::routing::get;
use axum::{Json, Router};
use kafold::prelude::*;
use kafold_axum::*;
use serde::{Deserialize, Serialize};

/// Stored as written: renaming a variant or a field changes what old events decode to.
#[derive(Clone, Debug, PartialEq, DomainEvent, Serialize, Deserialize)]
#[event(category = "account")]
enum AccountEvent {
    #[event("account.deposited")]
    Deposited { cents: u32 },
    #[event("account.withdrawn")]
    Withdrawn { cents: u32 },
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum AccountCommand {
    Deposit { cents: u32 },
    Withdraw { cents: u32 },
}

#[derive(Debug, PartialEq, Serialize, Deserialize, thiserror::Error)]
#[error("the account has less than that")]
struct Overdrawn;

impl Rule for Overdrawn {}

#[derive(Clone, Default)]
struct Account {
    balance: i64,
}

impl Aggregate for Account {
    type Command = AccountCommand;
    type Event = AccountEvent;
    type Error = Overdrawn;

    fn decide(&self, command: &AccountCommand) -> Result<Vec<AccountEvent>, Overdrawn> {
        match *command {
            AccountCommand::Deposit { cents } => Ok(vec![AccountEvent::Deposited { cents }]),
            AccountCommand::Withdraw { cents } if i64::from(cents) > self.balance => Err(Overdrawn),
            AccountCommand::Withdraw { cents } => Ok(vec![AccountEvent::Withdrawn { cents }]),
        }
    }

    fn evolve(&mut self, event: &AccountEvent) {
        match *event {
            AccountEvent::Deposited { cents } => self.balance += i64::from(cents),
            AccountEvent::Withdrawn { cents } => self.balance -= i64::from(cents),
        }
    }
}

/// The read model `balances`: one row an account, folded from the events of the account.
#[derive(Clone, Debug, PartialEq, Row, Serialize)]
struct Balance {
    #[row(stream)]
    account: String,
    cents: i64,
}

impl ReadModel for Balance {
    const NAME: &'static str = "balances";
    type Event = AccountEvent;

    fn fold(id: &String, row: Option<Self>, event: &Recorded<AccountEvent>) -> Option<Self> {
        let mut account = Account { balance: row.map_or(0, |row| row.cents) };
        account.evolve(&event.event);
        Some(Self { account: id.clone(), cents: account.balance })
    }
}

async fn change(
    Opened(kafold): Opened,
    Id(id): Id,
    call: Call,
    Body(command): Body<AccountCommand>,
) -> Result<Done, Problem> {
    call.handle(&kafold.handler::<Account>(), &id, &command).await
}

async fn balance(
    Opened(kafold): Opened,
    Id(id): Id,
    after: After,
) -> Result<(Applied, Json<Balance>), Problem> {
    let applied = after.wait::<Balance>(&kafold).await?;
    let balance = kafold.query::<Balance>().get(&id).await?;
    let unknown = || Problem::unknown(format!("there is no account {id:?}"));
    Ok((applied, Json(balance.ok_or_else(unknown)?)))
}

fn routes() -> Router<Http> {
    Router::new().route("/accounts/{id}", get(balance).post(change))
}

fn start(kafold: Kafold) -> Kafold {
    kafold.handler::<Account>(); // takes the commands that other nodes send
    kafold.projections().with::<Balance>().spawn();
    kafold
}

#[tokio::main]
async fn main() -> Result<(), ServeError> {
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    let kafold = kafold::open_from_env("sqlite://accounts.db"); // or KAFOLD_LOG, KAFOLD_DATABASE
    Service::new("accounts", routes()).from_env()?.run(kafold, start).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::body::to_bytes;
    use axum::http::{Request, StatusCode};
    use tower::ServiceExt;

    #[test]
    fn an_account_is_not_overdrawn() {
        let account = scenario::<Account>().given([AccountEvent::Deposited { cents: 500 }]);
        account.when(AccountCommand::Withdraw { cents: 600 }).then_rejected(Overdrawn);
    }

    #[test]
    fn the_balance_is_the_sum() {
        projection_test::<Balance>()
            .stream("ada")
            .given([AccountEvent::Deposited { cents: 500 }, AccountEvent::Withdrawn { cents: 200 }])
            .rows([Balance { account: "ada".into(), cents: 300 }]);
    }

    #[tokio::test]
    async fn a_deposit_is_in_the_balance() -> Result<(), Box<dyn std::error::Error>> {
        let folder = tempfile::tempdir()?;
        let log = format!("sqlite://{}", folder.path().join("accounts.db").display());
        let app = routes().with_state(Http::opened(start(kafold::open(log).await?)));
        let deposit = Request::post("/accounts/ada")
            .header("content-type", "application/json")
            .body(r#"{"deposit":{"cents":500}}"#.to_owned())?;
        assert_eq!(app.clone().oneshot(deposit).await?.status(), StatusCode::OK);
        let balance = Request::get("/accounts/ada?after=0:0").body(String::new())?;
        let balance = to_bytes(app.oneshot(balance).await?.into_body(), 1_000).await?;
        assert_eq!(balance, r#"{"account":"ada","cents":500}"#);
        Ok(())
    }
}
