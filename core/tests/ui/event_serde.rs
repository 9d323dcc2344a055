use kafold_core::DomainEvent;
use serde::{Deserialize, Serialize};

#[derive(DomainEvent, Serialize, Deserialize, Clone, Debug)]
#[serde(tag = "kind", rename_all = "camelCase")]
enum Tagged {
    #[event("tagged.happened")]
    Happened { amount_cents: u64 },
    #[event("tagged.skipped")]
    #[serde(rename = "s", skip_deserializing)]
    Skipped,
}

fn main() {}
