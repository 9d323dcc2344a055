use kafold_core::{DomainEvent, EventSet};
use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, DomainEvent, Serialize, Deserialize)]
#[event(category = "search")]
enum SearchEvent {
    #[event("search.made")]
    Made,
}

#[derive(Debug, Clone, DomainEvent, Serialize, Deserialize)]
enum NoCategory {
    #[event("member.acted")]
    Acted,
}

#[derive(Debug, Clone, EventSet)]
struct NoEnum(SearchEvent);

#[derive(Debug, Clone, EventSet)]
enum Empty {}

#[derive(Debug, Clone, EventSet)]
enum Shapes {
    Search(SearchEvent),
    Nothing,
    Two(SearchEvent, SearchEvent),
    Named { event: SearchEvent },
}

#[derive(Debug, Clone, EventSet)]
enum Texts {
    Search(SearchEvent),
    Text(String),
}

fn main() {}
