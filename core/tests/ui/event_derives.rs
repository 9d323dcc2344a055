use kafold_core::DomainEvent;
use serde::{Deserialize, Serialize};

#[derive(DomainEvent, Clone, Debug)]
enum WithoutSerde {
    #[event("order.placed")]
    Placed,
}

#[derive(DomainEvent, Serialize, Deserialize)]
enum WithoutCloneAndDebug {
    #[event("payment.taken")]
    Taken,
}

fn main() {}
