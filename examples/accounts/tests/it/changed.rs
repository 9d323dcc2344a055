//! The guide's chapter on changed events.

use kafold::codec::Upcasters;
use kafold::prelude::*;
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, PartialEq, DomainEvent, Serialize, Deserialize)]
#[event(category = "account", upcasters = upcasters)]
enum AccountEvent {
    #[event("account.deposited", version = 2)]
    Deposited { cents: u32, currency: String },
}

fn upcasters() -> Upcasters {
    Upcasters::none().add("account.deposited", 1, |mut json| {
        json["currency"] = "EUR".into();
        Ok(json)
    })
}

#[derive(Serialize, Deserialize)]
struct Deposit {
    cents: u32,
    currency: String,
}

#[derive(Debug, PartialEq, Serialize, Deserialize, thiserror::Error)]
#[error("the account is in {0}")]
struct OtherCurrency(String);

#[derive(Clone, Default)]
struct Account {
    currency: Option<String>,
}

impl Aggregate for Account {
    type Command = Deposit;
    type Event = AccountEvent;
    type Error = OtherCurrency;

    fn decide(&self, deposit: &Deposit) -> Result<Vec<AccountEvent>, OtherCurrency> {
        match &self.currency {
            Some(currency) if *currency != deposit.currency => Err(OtherCurrency(currency.clone())),
            _ => {
                let Deposit { cents, currency } = deposit;
                Ok(vec![AccountEvent::Deposited { cents: *cents, currency: currency.clone() }])
            }
        }
    }

    fn evolve(&mut self, AccountEvent::Deposited { currency, .. }: &AccountEvent) {
        self.currency = Some(currency.clone());
    }
}

#[test]
fn an_old_deposit_was_in_euros() {
    scenario::<Account>()
        .given_stored("account.deposited.v1", r#"{"cents":500}"#)
        .when(Deposit { cents: 100, currency: "USD".into() })
        .then_rejected(OtherCurrency("EUR".into()));
}
