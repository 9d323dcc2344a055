use kafold_core::{DomainEvent, EventSet};
use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, DomainEvent, Serialize, Deserialize)]
#[event(category = "search")]
enum SearchEvent {
    #[event("search.made")]
    Made,
}

#[derive(Debug, Clone, DomainEvent, Serialize, Deserialize)]
#[event(category = "search")]
enum OtherSearchEvent {
    #[event("search.repeated")]
    Repeated,
}

#[derive(Debug, Clone, DomainEvent, Serialize, Deserialize)]
enum NoCategory {
    #[event("member.acted")]
    Acted,
}

#[derive(Debug, Clone, EventSet)]
enum Twice {
    Search(SearchEvent),
    Other(OtherSearchEvent),
}

#[derive(Debug, Clone, EventSet)]
enum Undeclared {
    Search(SearchEvent),
    Member(NoCategory),
}

fn main() {}
