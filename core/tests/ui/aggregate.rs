use kafold_core::{Aggregate, DomainEvent};
use serde::{Deserialize, Serialize};

#[derive(DomainEvent, Serialize, Deserialize, Clone, Debug)]
#[event(category = "order")]
enum OrderEvent {
    #[event("order.placed")]
    Placed,
}

#[derive(Default)]
struct WithoutClone;

impl Aggregate for WithoutClone {
    type Command = ();
    type Event = OrderEvent;
    type Error = std::convert::Infallible;

    fn decide(&self, _: &()) -> Result<Vec<OrderEvent>, Self::Error> {
        Ok(vec![OrderEvent::Placed])
    }

    fn evolve(&mut self, _: &OrderEvent) {}
}

#[derive(Default, Clone)]
struct ErrorIsText;

impl Aggregate for ErrorIsText {
    type Command = ();
    type Event = OrderEvent;
    type Error = String;

    fn decide(&self, _: &()) -> Result<Vec<OrderEvent>, String> {
        Err("no".to_owned())
    }

    fn evolve(&mut self, _: &OrderEvent) {}
}

fn main() {}
