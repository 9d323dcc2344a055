//! The order: placed, paid, shipped, or cancelled before shipment.
//!
//! The whole aggregate in one file: events, commands, errors, state, decisions, tests.

use std::borrow::Cow;

use chrono::{DateTime, TimeZone, Utc};
use kafold::{Aggregate, DomainEvent};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Most lines of one order.
pub(crate) const LINES_MAX: usize = 100;
/// Most pieces of one order, all lines together.
pub(crate) const QUANTITY_MAX: i64 = 1_000_000;
/// Highest amount of one order in cents, all lines together: ten million dollars.
///
/// This and [`QUANTITY_MAX`] are why no report can overflow: a sum is an `i64`, which holds 9.2
/// thousand million orders of the highest amount, and as many of them would be a log of terabytes.
pub(crate) const AMOUNT_CENTS_MAX: i64 = 1_000_000_000;
/// Longest customer, sku, carrier or tracking number, in bytes.
pub(crate) const NAME_BYTES_MAX: usize = 200;
/// Longest reason of a cancellation, in bytes.
pub(crate) const REASON_BYTES_MAX: usize = 1_000;
/// An order is placed from the beginning of this year …
pub(crate) const PLACED_YEAR_MIN: i32 = 1900;
/// … and before the beginning of this one: what every database can hold as a date.
pub(crate) const PLACED_YEAR_END: i32 = 2200;

/// Some pieces of one article.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Line {
    /// The article. It may stand in several lines of an order.
    pub(crate) sku: String,
    /// How many, at least 1.
    pub(crate) quantity: i64,
    /// What the whole line costs, at least 0.
    pub(crate) amount_cents: i64,
}

/// Stored as written: renaming a variant or a field changes what old events decode to.
///
/// Each event carries what its readers need, so that none has to remember another one: payment and
/// shipment repeat the customer, the cancellation everything that a report has to take back.
#[derive(Debug, Clone, PartialEq, Eq, DomainEvent, Serialize, Deserialize)]
#[event(category = Order::CATEGORY)]
pub(crate) enum OrderEvent {
    /// A customer ordered.
    #[event("order.placed", version = 1)]
    Placed { customer: String, lines: Vec<Line>, placed_at: DateTime<Utc> },
    /// The customer paid the whole amount.
    #[event("order.paid", version = 1)]
    Paid { customer: String, amount_cents: i64 },
    /// The goods left.
    #[event("order.shipped", version = 1)]
    Shipped { customer: String, carrier: String, tracking: String },
    /// The order is void.
    #[event("order.cancelled", version = 1)]
    Cancelled { reason: String, customer: String, lines: Vec<Line>, placed_at: DateTime<Utc> },
}

impl OrderEvent {
    /// Returns whether the command decides this event. Ignores the time of the order unless `has_time`.
    pub(crate) fn is_of(&self, command: &OrderCommand, has_time: bool) -> bool {
        match (self, command) {
            (
                Self::Placed { customer, lines, placed_at },
                OrderCommand::Place { customer: by, lines: asked, placed_at: at },
            ) => customer == by && lines == asked && (!has_time || placed_at == at),
            (Self::Paid { amount_cents, .. }, OrderCommand::Pay { amount_cents: asked }) => {
                amount_cents == asked
            }
            (
                Self::Shipped { carrier, tracking, .. },
                OrderCommand::Ship { carrier: by, tracking: number },
            ) => carrier == by && tracking == number,
            (Self::Cancelled { reason, .. }, OrderCommand::Cancel { reason: why }) => reason == why,
            _ => false,
        }
    }
}

/// What may be asked of an order. It travels between the nodes of the service as it is written here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum OrderCommand {
    /// Order the lines for the customer.
    Place { customer: String, lines: Vec<Line>, placed_at: DateTime<Utc> },
    /// Pay it, once and in full.
    Pay { amount_cents: i64 },
    /// Hand it to a carrier, when it is paid.
    Ship { carrier: String, tracking: String },
    /// Call it off, before shipment.
    Cancel { reason: String },
}

/// The rules, each with what to do about it. A node is told by another one which it was.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
pub(crate) enum OrderError {
    #[error("there is no such order: place it first")]
    Unknown,
    #[error("an order of this id exists: choose another order_id, or leave it out")]
    Exists,
    #[error("the order is paid: it is paid only once")]
    AlreadyPaid,
    #[error("the order costs {due} cents and is paid in full, not with {offered}")]
    WrongAmount { due: i64, offered: i64 },
    #[error("the order is not paid: pay it before shipment")]
    NotPaid,
    #[error("the order has been shipped: it can neither be shipped again nor cancelled")]
    AlreadyShipped,
    #[error("the order is cancelled: nothing more can happen to it")]
    Cancelled,
    #[error("an order has 1 to {LINES_MAX} lines, this one has {0}")]
    Lines(usize),
    #[error(
        "the quantity of each line is at least 1, of all lines together at most {QUANTITY_MAX}: \
         {0} is not"
    )]
    Quantity(i64),
    #[error(
        "the amount_cents of each line is at least 0, of all lines together at most \
         {AMOUNT_CENTS_MAX}: {0} is not"
    )]
    Amount(i64),
    #[error(
        "{field} has 1 to {bytes_max} bytes, more than blanks and no control characters; \
         this one has {bytes} bytes"
    )]
    Text { field: Cow<'static, str>, bytes_max: usize, bytes: usize },
    #[error(
        "customer has 1 to {NAME_BYTES_MAX} bytes, more than blanks, no control characters and no \
         '/'; this one has {0} bytes"
    )]
    Customer(usize),
    #[error(
        "placed_at is in a year from {PLACED_YEAR_MIN} on and before {PLACED_YEAR_END}, {0} is not"
    )]
    PlacedAt(DateTime<Utc>),
}

/// How far an order has come.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Status {
    #[default]
    Unknown,
    Placed,
    Paid,
    Shipped,
    Cancelled,
}

/// An order's state: what decisions need and no more.
#[derive(Debug, Clone, Default)]
pub(crate) struct Order {
    status: Status,
    customer: String,
    lines: Vec<Line>,
    placed_at: DateTime<Utc>,
}

impl Aggregate for Order {
    const CATEGORY: &'static str = "order";
    type Command = OrderCommand;
    type Event = OrderEvent;
    type Error = OrderError;

    fn decide(&self, command: &OrderCommand) -> Result<Vec<OrderEvent>, OrderError> {
        let event = match command {
            OrderCommand::Place { customer, lines, placed_at } => {
                self.place(customer, lines, *placed_at)
            }
            OrderCommand::Pay { amount_cents } => self.pay(*amount_cents),
            OrderCommand::Ship { carrier, tracking } => self.ship(carrier, tracking),
            OrderCommand::Cancel { reason } => self.cancel(reason),
        }?;
        Ok(vec![event])
    }

    fn evolve(&mut self, event: &OrderEvent) {
        match event {
            OrderEvent::Placed { customer, lines, placed_at } => {
                self.status = Status::Placed;
                self.customer.clone_from(customer);
                self.lines.clone_from(lines);
                self.placed_at = *placed_at;
            }
            OrderEvent::Paid { .. } => self.status = Status::Paid,
            OrderEvent::Shipped { .. } => self.status = Status::Shipped,
            OrderEvent::Cancelled { .. } => self.status = Status::Cancelled,
        }
    }
}

impl Order {
    fn place(
        &self,
        customer: &str,
        lines: &[Line],
        placed_at: DateTime<Utc>,
    ) -> Result<OrderEvent, OrderError> {
        if self.status != Status::Unknown {
            return Err(OrderError::Exists);
        }
        check_customer(customer)?;
        check_lines(lines)?;
        check_placed_at(placed_at)?;
        Ok(OrderEvent::Placed { customer: customer.into(), lines: lines.into(), placed_at })
    }

    fn pay(&self, amount_cents: i64) -> Result<OrderEvent, OrderError> {
        match self.status {
            Status::Unknown => return Err(OrderError::Unknown),
            Status::Cancelled => return Err(OrderError::Cancelled),
            Status::Paid | Status::Shipped => return Err(OrderError::AlreadyPaid),
            Status::Placed => {}
        }
        let due = amount_cents_of(&self.lines);
        if amount_cents != due {
            return Err(OrderError::WrongAmount { due, offered: amount_cents });
        }
        Ok(OrderEvent::Paid { customer: self.customer.clone(), amount_cents })
    }

    fn ship(&self, carrier: &str, tracking: &str) -> Result<OrderEvent, OrderError> {
        match self.status {
            Status::Unknown => return Err(OrderError::Unknown),
            Status::Cancelled => return Err(OrderError::Cancelled),
            Status::Shipped => return Err(OrderError::AlreadyShipped),
            Status::Placed => return Err(OrderError::NotPaid),
            Status::Paid => {}
        }
        check_text("carrier", carrier, NAME_BYTES_MAX)?;
        check_text("tracking", tracking, NAME_BYTES_MAX)?;
        Ok(OrderEvent::Shipped {
            customer: self.customer.clone(),
            carrier: carrier.into(),
            tracking: tracking.into(),
        })
    }

    fn cancel(&self, reason: &str) -> Result<OrderEvent, OrderError> {
        match self.status {
            Status::Unknown => return Err(OrderError::Unknown),
            Status::Cancelled => return Err(OrderError::Cancelled),
            Status::Shipped => return Err(OrderError::AlreadyShipped),
            Status::Placed | Status::Paid => {}
        }
        check_text("reason", reason, REASON_BYTES_MAX)?;
        Ok(OrderEvent::Cancelled {
            reason: reason.into(),
            customer: self.customer.clone(),
            lines: self.lines.clone(),
            placed_at: self.placed_at,
        })
    }
}

/// What all lines together cost. In range, because [`check_lines`] has seen every accepted line.
pub(crate) fn amount_cents_of<'l>(lines: impl IntoIterator<Item = &'l Line>) -> i64 {
    lines.into_iter().map(|line| line.amount_cents).sum()
}

/// How many pieces all lines together have, in range as [`amount_cents_of`].
pub(crate) fn quantity_of<'l>(lines: impl IntoIterator<Item = &'l Line>) -> i64 {
    lines.into_iter().map(|line| line.quantity).sum()
}

fn check_lines(lines: &[Line]) -> Result<(), OrderError> {
    if lines.is_empty() || lines.len() > LINES_MAX {
        return Err(OrderError::Lines(lines.len()));
    }
    let (mut quantity, mut amount_cents) = (0, 0);
    for line in lines {
        check_text("sku", &line.sku, NAME_BYTES_MAX)?;
        // Each line is checked before it is added: LINES_MAX of the highest stay far below i64::MAX.
        if !(1..=QUANTITY_MAX).contains(&line.quantity) {
            return Err(OrderError::Quantity(line.quantity));
        }
        if !(0..=AMOUNT_CENTS_MAX).contains(&line.amount_cents) {
            return Err(OrderError::Amount(line.amount_cents));
        }
        quantity += line.quantity;
        amount_cents += line.amount_cents;
    }
    if quantity > QUANTITY_MAX {
        return Err(OrderError::Quantity(quantity));
    }
    if amount_cents > AMOUNT_CENTS_MAX {
        return Err(OrderError::Amount(amount_cents));
    }
    Ok(())
}

/// A customer's id, like an order's, stands in the path of a URL.
pub(crate) fn check_customer(customer: &str) -> Result<(), OrderError> {
    let is_valid = is_text(customer, NAME_BYTES_MAX) && !customer.contains('/');
    if is_valid { Ok(()) } else { Err(OrderError::Customer(customer.len())) }
}

fn check_text(field: &'static str, text: &str, bytes_max: usize) -> Result<(), OrderError> {
    let bytes = text.len();
    if is_text(text, bytes_max) {
        Ok(())
    } else {
        Err(OrderError::Text { field: field.into(), bytes_max, bytes })
    }
}

fn is_text(text: &str, bytes_max: usize) -> bool {
    // PostgreSQL has no text with a NUL, and the rest of them are no part of a name either.
    !text.trim().is_empty() && text.len() <= bytes_max && !text.chars().any(char::is_control)
}

fn check_placed_at(placed_at: DateTime<Utc>) -> Result<(), OrderError> {
    let beginning = |year| Utc.with_ymd_and_hms(year, 1, 1, 0, 0, 0).single();
    let is_valid = beginning(PLACED_YEAR_MIN).is_some_and(|begin| begin <= placed_at)
        && beginning(PLACED_YEAR_END).is_some_and(|end| placed_at < end);
    if is_valid { Ok(()) } else { Err(OrderError::PlacedAt(placed_at)) }
}

#[cfg(test)]
mod tests {
    use kafold::scenario::scenario;

    use super::*;

    fn noon() -> DateTime<Utc> {
        Utc.with_ymd_and_hms(2024, 2, 29, 12, 0, 0).single().expect("a day")
    }

    fn line(quantity: i64, amount_cents: i64) -> Line {
        Line { sku: "a".into(), quantity, amount_cents }
    }

    fn place(lines: Vec<Line>) -> OrderCommand {
        OrderCommand::Place { customer: "c1".into(), lines, placed_at: noon() }
    }

    fn placed() -> OrderEvent {
        let lines = vec![line(2, 2500), line(1, 0)];
        OrderEvent::Placed { customer: "c1".into(), lines, placed_at: noon() }
    }

    fn paid() -> OrderEvent {
        OrderEvent::Paid { customer: "c1".into(), amount_cents: 2500 }
    }

    fn ship() -> OrderCommand {
        OrderCommand::Ship { carrier: "post".into(), tracking: "t1".into() }
    }

    fn shipped() -> OrderEvent {
        let (carrier, tracking) = ("post".into(), "t1".into());
        OrderEvent::Shipped { customer: "c1".into(), carrier, tracking }
    }

    fn cancel() -> OrderCommand {
        OrderCommand::Cancel { reason: "changed my mind".into() }
    }

    fn cancelled() -> OrderEvent {
        OrderEvent::Cancelled {
            reason: "changed my mind".into(),
            customer: "c1".into(),
            lines: vec![line(2, 2500), line(1, 0)],
            placed_at: noon(),
        }
    }

    fn pay(amount_cents: i64) -> OrderCommand {
        OrderCommand::Pay { amount_cents }
    }

    fn accepts<const N: usize>(given: [OrderEvent; N], command: OrderCommand, event: OrderEvent) {
        scenario::<Order>().given(given).when(command).then([event]);
    }

    fn refuses<const N: usize>(given: [OrderEvent; N], command: OrderCommand, rule: OrderError) {
        scenario::<Order>().given(given).when(command).then_rejected(rule);
    }

    #[test]
    fn an_order_is_placed_paid_and_shipped() {
        accepts([], place(vec![line(2, 2500), line(1, 0)]), placed());
        accepts([placed()], pay(2500), paid());
        accepts([placed(), paid()], ship(), shipped());
    }

    #[test]
    fn an_order_exists_only_once() {
        refuses([placed()], place(vec![line(1, 1)]), OrderError::Exists);
        refuses([placed(), cancelled()], place(vec![line(1, 1)]), OrderError::Exists);
    }

    #[test]
    fn nothing_happens_to_an_order_that_was_never_placed() {
        for command in [pay(0), ship(), cancel()] {
            refuses([], command, OrderError::Unknown);
        }
    }

    #[test]
    fn payment_is_once_and_in_full() {
        let wrong = |offered| OrderError::WrongAmount { due: 2500, offered };
        refuses([placed()], pay(2499), wrong(2499));
        refuses([placed()], pay(-2500), wrong(-2500));
        refuses([placed(), paid()], pay(2500), OrderError::AlreadyPaid);
        refuses([placed(), paid(), shipped()], pay(2500), OrderError::AlreadyPaid);
        refuses([placed(), cancelled()], pay(2500), OrderError::Cancelled);
    }

    #[test]
    fn nothing_pays_an_order_that_costs_nothing() {
        let free = || OrderEvent::Placed {
            customer: "c1".into(),
            lines: vec![line(1, 0)],
            placed_at: noon(),
        };
        let paid = OrderEvent::Paid { customer: "c1".into(), amount_cents: 0 };
        accepts([free()], pay(0), paid.clone());
        refuses([free()], ship(), OrderError::NotPaid);
        refuses([free(), paid], pay(0), OrderError::AlreadyPaid);
    }

    #[test]
    fn only_a_paid_order_is_shipped_and_only_once() {
        refuses([placed()], ship(), OrderError::NotPaid);
        refuses([placed(), paid(), shipped()], ship(), OrderError::AlreadyShipped);
        refuses([placed(), paid(), cancelled()], ship(), OrderError::Cancelled);
    }

    #[test]
    fn an_order_is_cancelled_before_shipment_only() {
        accepts([placed()], cancel(), cancelled());
        accepts([placed(), paid()], cancel(), cancelled());
        refuses([placed(), paid(), shipped()], cancel(), OrderError::AlreadyShipped);
        refuses([placed(), cancelled()], cancel(), OrderError::Cancelled);
    }

    #[test]
    fn what_no_report_could_add_up_is_refused() {
        let half = line(QUANTITY_MAX / 2, AMOUNT_CENTS_MAX / 2);
        let highest = vec![half.clone(), half];
        accepts(
            [],
            place(highest.clone()),
            OrderEvent::Placed { customer: "c1".into(), lines: highest, placed_at: noon() },
        );
        let quantity = |given, told| refuses([], place(given), OrderError::Quantity(told));
        quantity(vec![line(0, 1)], 0);
        quantity(vec![line(-1, 1)], -1);
        quantity(vec![line(i64::MAX, 1), line(i64::MAX, 1)], i64::MAX);
        quantity(vec![line(QUANTITY_MAX, 1), line(1, 1)], QUANTITY_MAX + 1);
        let amount = |given, told| refuses([], place(given), OrderError::Amount(told));
        amount(vec![line(1, -1)], -1);
        amount(vec![line(1, i64::MAX), line(1, i64::MAX)], i64::MAX);
        amount(vec![line(1, AMOUNT_CENTS_MAX), line(1, 1)], AMOUNT_CENTS_MAX + 1);
        refuses([], place(vec![]), OrderError::Lines(0));
        refuses([], place(vec![line(1, 1); LINES_MAX + 1]), OrderError::Lines(LINES_MAX + 1));
    }

    #[test]
    fn texts_that_a_database_could_not_hold_are_refused() {
        let customer = |customer: &str| OrderCommand::Place {
            customer: customer.into(),
            lines: vec![line(1, 1)],
            placed_at: noon(),
        };
        for bad in ["", " ", "a\0b", "a\nb", "a/b", &"x".repeat(NAME_BYTES_MAX + 1)] {
            refuses([], customer(bad), OrderError::Customer(bad.len()));
        }
        let reason = OrderCommand::Cancel { reason: String::new() };
        let (bytes_max, bytes) = (REASON_BYTES_MAX, 0);
        refuses([placed()], reason, OrderError::Text { field: "reason".into(), bytes_max, bytes });
    }

    #[test]
    fn an_order_is_placed_within_what_every_database_holds() {
        let at = |year| Utc.with_ymd_and_hms(year, 1, 1, 0, 0, 0).single().expect("a day");
        for year in [PLACED_YEAR_MIN - 1, PLACED_YEAR_END, 9999] {
            let (customer, lines) = ("c1".into(), vec![line(1, 1)]);
            let command = OrderCommand::Place { customer, lines, placed_at: at(year) };
            refuses([], command, OrderError::PlacedAt(at(year)));
        }
    }
}
