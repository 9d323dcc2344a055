use kafold_core::DomainEvent;

#[derive(DomainEvent)]
struct Placed {
    amount_cents: u64,
}

#[derive(DomainEvent)]
enum Empty {}

#[derive(DomainEvent)]
enum Generic<'a, T> {
    #[event("generic.happened")]
    Happened(&'a T),
}

#[derive(DomainEvent)]
#[event(upcaster = upcasters)]
enum Misspelt {
    #[event("misspelt.happened")]
    Happened,
}

fn main() {}
