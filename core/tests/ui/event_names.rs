use kafold_core::DomainEvent;
use serde::{Deserialize, Serialize};

#[derive(DomainEvent, Serialize, Deserialize, Clone, Debug)]
enum OrderEvent {
    #[event("order.placed", version = 1)]
    Placed,
    #[event("order.placed", version = 2)]
    PlacedAgain,
    PaidInFull { amount_cents: u64 },
    #[event("Order Shipped")]
    Shipped,
    #[event("order.")]
    Dotted,
    #[event("1order")]
    Numbered,
    #[event("order.aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa")]
    Long,
    #[event("kafold.claim")]
    Reserved,
}

#[derive(DomainEvent, Serialize, Deserialize, Clone, Debug)]
enum PaymentEvent {
    #[event("payment.taken", version = 0)]
    Taken,
    #[event("payment.lost", version = 4294967296)]
    Lost,
    #[event("payment.returned", verson = 1)]
    Returned,
    #[event(version = 1)]
    Unnamed,
    #[event]
    Bare,
    #[event("payment.a")]
    #[event("payment.b")]
    Twice,
}

fn main() {}
