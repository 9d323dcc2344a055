//! The one aggregate of the benchmarks: an account into which is paid, and its read models.

use std::convert::Infallible;

use fastrand::Rng;
use kafold::projections::ReadModel;
use kafold::{Aggregate, DomainEvent, Recorded, Row};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Payload of an event around its memo, in bytes.
const AROUND_MEMO_BYTES: usize = r#"{"amount_cents":1234,"memo":""}"#.len();
/// What memos are made of: text that compresses as text does.
const WORDS: [&str; 32] = [
    "invoice",
    "transfer",
    "rent",
    "salary",
    "refund",
    "from",
    "to",
    "for",
    "the",
    "monthly",
    "payment",
    "order",
    "number",
    "customer",
    "account",
    "of",
    "january",
    "insurance",
    "premium",
    "electricity",
    "and",
    "water",
    "subscription",
    "book",
    "card",
    "purchase",
    "at",
    "store",
    "savings",
    "interest",
    "fee",
    "gift",
];

/// Stored as written: renaming a variant or a field changes what old events decode to.
#[derive(Debug, Clone, PartialEq, Eq, DomainEvent, Serialize, Deserialize)]
#[event(category = Account::CATEGORY)]
pub enum AccountEvent {
    /// Somebody paid in.
    #[event("account.deposited", version = 1)]
    Deposited {
        /// How much.
        amount_cents: i64,
        /// What for.
        memo: String,
    },
}

/// Pay in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Deposit {
    /// How much.
    pub amount_cents: i64,
    /// What for.
    pub memo: String,
}

impl Deposit {
    /// One whose event has a payload of exactly so many bytes, of which at least the 31 around the
    /// memo.
    pub fn of_bytes(payload_bytes: usize, random: &mut Rng) -> Self {
        let memo_bytes = payload_bytes.saturating_sub(AROUND_MEMO_BYTES);
        let mut memo = String::with_capacity(memo_bytes + 16);
        while memo.len() < memo_bytes {
            match random.u8(..8) {
                0 => memo.push_str(&random.u32(..1_000_000).to_string()),
                _ => memo.push_str(WORDS[random.usize(..WORDS.len())]),
            }
            memo.push(' ');
        }
        memo.truncate(memo_bytes);
        Self { amount_cents: random.i64(1_000..10_000), memo }
    }

    /// What follows from it.
    pub fn event(&self) -> AccountEvent {
        AccountEvent::Deposited { amount_cents: self.amount_cents, memo: self.memo.clone() }
    }
}

/// A balance.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Account {
    /// All that was paid in.
    pub balance_cents: i64,
    /// How often.
    pub deposits: u64,
}

impl Aggregate for Account {
    const CATEGORY: &'static str = "account";
    type Command = Deposit;
    type Event = AccountEvent;
    type Error = Infallible;

    fn decide(&self, command: &Deposit) -> Result<Vec<AccountEvent>, Infallible> {
        Ok(vec![command.event()])
    }

    fn evolve(&mut self, event: &AccountEvent) {
        let AccountEvent::Deposited { amount_cents, .. } = event;
        self.balance_cents += amount_cents;
        self.deposits += 1;
    }
}

/// A row for each account, and the read model `balances`.
#[derive(Debug, Clone, PartialEq, Row)]
pub struct Balance {
    /// The account.
    #[row(stream)]
    pub id: String,
    /// All that was paid in.
    pub balance_cents: i64,
    /// How often.
    pub deposits: i64,
}

impl ReadModel for Balance {
    const NAME: &'static str = "balances";
    type Event = AccountEvent;

    fn fold(id: &String, row: Option<Self>, event: &Recorded<AccountEvent>) -> Option<Self> {
        let mut row = row.unwrap_or(Self { id: id.clone(), balance_cents: 0, deposits: 0 });
        let AccountEvent::Deposited { amount_cents, .. } = &event.event;
        row.balance_cents += amount_cents;
        row.deposits += 1;
        Some(row)
    }
}

/// A row for each event, and the read model `movements`.
#[derive(Debug, Clone, PartialEq, Row)]
pub struct Movement {
    /// The event.
    #[row(key)]
    pub id: Uuid,
    /// The account.
    pub account: String,
    /// How much was paid in.
    pub amount_cents: i64,
    /// The how-maniest of the account it was.
    pub version: i64,
}

impl ReadModel for Movement {
    const NAME: &'static str = "movements";
    const SHARED: bool = false;
    type Event = AccountEvent;

    fn keys(event: &Recorded<AccountEvent>) -> Vec<Uuid> {
        vec![event.metadata.event_id]
    }

    fn fold(id: &Uuid, _: Option<Self>, event: &Recorded<AccountEvent>) -> Option<Self> {
        let AccountEvent::Deposited { amount_cents, .. } = event.event;
        let (account, version) = (event.stream.id().to_owned(), event.version.0 as i64);
        Some(Self { id: *id, account, amount_cents, version })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn payloads_have_the_bytes_that_were_asked_for() {
        let mut random = Rng::with_seed(1);
        for bytes in [64, 256, 1_024] {
            let payload = kafold::codec::encode(&Deposit::of_bytes(bytes, &mut random).event());
            assert_eq!(payload.expect("encodes").len(), bytes);
        }
    }
}
