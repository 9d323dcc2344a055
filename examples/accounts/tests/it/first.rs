use kafold::prelude::*;

#[derive(Clone, Debug, PartialEq, DomainEvent, serde::Serialize, serde::Deserialize)]
#[event(category = "account")]
enum AccountEvent {
    #[event("account.deposited")]
    Deposited { cents: u32 },
    #[event("account.withdrawn")]
    Withdrawn { cents: u32 },
}

#[derive(serde::Serialize, serde::Deserialize)]
enum AccountCommand {
    Deposit { cents: u32 },
    Withdraw { cents: u32 },
}

#[derive(Debug, PartialEq, serde::Serialize, serde::Deserialize, thiserror::Error)]
#[error("the account has less than that")]
struct Overdrawn;

#[derive(Clone, Default)]
struct Account(i64);

impl Aggregate for Account {
    type Command = AccountCommand;
    type Event = AccountEvent;
    type Error = Overdrawn;

    fn decide(&self, command: &AccountCommand) -> Result<Vec<AccountEvent>, Overdrawn> {
        match *command {
            AccountCommand::Deposit { cents } => Ok(vec![AccountEvent::Deposited { cents }]),
            AccountCommand::Withdraw { cents } if i64::from(cents) > self.0 => Err(Overdrawn),
            AccountCommand::Withdraw { cents } => Ok(vec![AccountEvent::Withdrawn { cents }]),
        }
    }

    fn evolve(&mut self, event: &AccountEvent) {
        match *event {
            AccountEvent::Deposited { cents } => self.0 += i64::from(cents),
            AccountEvent::Withdrawn { cents } => self.0 -= i64::from(cents),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Row)]
struct Balance {
    #[row(stream)]
    account: String,
    cents: i64,
}

impl ReadModel for Balance {
    const NAME: &'static str = "balances";
    type Event = AccountEvent;

    fn fold(id: &String, row: Option<Self>, event: &Recorded<AccountEvent>) -> Option<Self> {
        let mut account = Account(row.map_or(0, |row| row.cents));
        account.evolve(&event.event);
        Some(Self { account: id.clone(), cents: account.0 })
    }
}

#[tokio::main]
pub(crate) async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let kafold = kafold::open("sqlite://accounts.db").await?;
    kafold.projections().with::<Balance>().spawn();
    let accounts = kafold.handler::<Account>();
    let deposited = accounts.handle("ada", &AccountCommand::Deposit { cents: 500 }).await?;
    println!("{:?}", kafold.query::<Balance>().after(&deposited).get("ada").await?);
    kafold.close().await;
    Ok(())
}

#[test]
fn an_account_is_not_overdrawn() {
    let account = scenario::<Account>().given([AccountEvent::Deposited { cents: 500 }]);
    account.when(AccountCommand::Withdraw { cents: 600 }).then_rejected(Overdrawn);
}
