use kafold_core::DomainEvent;
use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, DomainEvent, Serialize, Deserialize)]
#[event(category = "Account")]
enum UpperCase {
    #[event("account.opened")]
    Opened,
}

#[derive(Debug, Clone, DomainEvent, Serialize, Deserialize)]
#[event(category = "bank-account")]
enum Hyphen {
    #[event("account.opened")]
    Opened,
}

#[derive(Debug, Clone, DomainEvent, Serialize, Deserialize)]
#[event(category = "account", category = "order")]
enum Twice {
    #[event("account.opened")]
    Opened,
}

fn main() {}
