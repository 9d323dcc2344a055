//! The read models that kafold folds by key: one order, the orders of a customer, and sales by day
//! and by customer. Sales by sku are written by hand, in [`crate::sales_by_sku`].

use chrono::{DateTime, NaiveDate, Utc};
use kafold::projections::ReadModel;
use kafold::{Recorded, Row};
use serde::Serialize;
use utoipa::ToSchema;
use uuid::Uuid;

use crate::order::{Line, OrderEvent, amount_cents_of, quantity_of};

/// How far an order has come, as it is shown.
fn status(event: &OrderEvent) -> String {
    let status = match event {
        OrderEvent::Placed { .. } => "placed",
        OrderEvent::Paid { .. } => "paid",
        OrderEvent::Shipped { .. } => "shipped",
        OrderEvent::Cancelled { .. } => "cancelled",
    };
    status.to_owned()
}

/// Everything about one order, as `GET /orders/{id}` shows it.
#[derive(Debug, Clone, PartialEq, Row, Serialize, ToSchema)]
pub(crate) struct OrderDetails {
    #[row(stream)]
    pub(crate) order_id: String,
    pub(crate) customer: String,
    pub(crate) status: String,
    #[row(json)]
    pub(crate) lines: Vec<Line>,
    pub(crate) quantity: i64,
    pub(crate) amount_cents: i64,
    pub(crate) placed_at: DateTime<Utc>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) carrier: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) tracking: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) reason: Option<String>,
    /// The version of the order's last event.
    pub(crate) version: i64,
    /// The position of that event in the log.
    #[serde(skip)]
    pub(crate) position: String,
    /// The command that placed the order: finds the order when its `Idempotency-Key` comes again.
    #[row(index)]
    #[serde(skip)]
    pub(crate) placed_by: Uuid,
}

impl ReadModel for OrderDetails {
    const NAME: &'static str = "order_details";
    type Event = OrderEvent;

    fn fold(order_id: &String, row: Option<Self>, event: &Recorded<OrderEvent>) -> Option<Self> {
        let mut row = match (&event.event, row) {
            (OrderEvent::Placed { customer, lines, placed_at }, _) => Self {
                order_id: order_id.clone(),
                customer: customer.clone(),
                status: String::new(),
                lines: lines.clone(),
                quantity: quantity_of(lines),
                amount_cents: amount_cents_of(lines),
                placed_at: *placed_at,
                carrier: None,
                tracking: None,
                reason: None,
                version: 0,
                position: String::new(),
                placed_by: event.command_id.0,
            },
            (_, row) => row?,
        };
        match &event.event {
            OrderEvent::Shipped { carrier, tracking, .. } => {
                row.carrier = Some(carrier.clone());
                row.tracking = Some(tracking.clone());
            }
            OrderEvent::Cancelled { reason, .. } => row.reason = Some(reason.clone()),
            OrderEvent::Placed { .. } | OrderEvent::Paid { .. } => {}
        }
        row.status = status(&event.event);
        // An order has at most four events.
        row.version = event.version.0 as i64;
        row.position = event.position.to_string();
        Some(row)
    }
}

/// One order in the list of its customer.
#[derive(Debug, Clone, PartialEq, Row, Serialize, ToSchema)]
pub(crate) struct CustomerOrder {
    #[row(stream)]
    pub(crate) order_id: String,
    #[row(index)]
    #[serde(skip)]
    pub(crate) customer: String,
    pub(crate) status: String,
    pub(crate) quantity: i64,
    pub(crate) amount_cents: i64,
    pub(crate) placed_at: DateTime<Utc>,
}

impl ReadModel for CustomerOrder {
    const NAME: &'static str = "customer_orders";
    type Event = OrderEvent;

    fn fold(order_id: &String, row: Option<Self>, event: &Recorded<OrderEvent>) -> Option<Self> {
        let row = match &event.event {
            OrderEvent::Placed { customer, lines, placed_at } => Self {
                order_id: order_id.clone(),
                customer: customer.clone(),
                status: String::new(),
                quantity: quantity_of(lines),
                amount_cents: amount_cents_of(lines),
                placed_at: *placed_at,
            },
            _ => row?,
        };
        Some(Self { status: status(&event.event), ..row })
    }
}

/// What an event adds to sales, or takes back.
pub(crate) struct Sale<'e> {
    pub(crate) customer: &'e str,
    pub(crate) lines: &'e [Line],
    pub(crate) placed_at: DateTime<Utc>,
    /// 1 or −1.
    pub(crate) sign: i64,
}

impl<'e> Sale<'e> {
    /// `None` when the event changes no sales.
    pub(crate) fn of(event: &'e OrderEvent) -> Option<Self> {
        match event {
            OrderEvent::Placed { customer, lines, placed_at } => {
                Some(Self { customer, lines, placed_at: *placed_at, sign: 1 })
            }
            OrderEvent::Cancelled { customer, lines, placed_at, .. } => {
                Some(Self { customer, lines, placed_at: *placed_at, sign: -1 })
            }
            OrderEvent::Paid { .. } | OrderEvent::Shipped { .. } => None,
        }
    }
}

/// Sums of a report. Additions only, so the order between partitions does not matter; the bounds in
/// [`crate::order`] keep them far inside an `i64`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, ToSchema)]
pub(crate) struct Sums {
    pub(crate) orders: i64,
    pub(crate) quantity: i64,
    pub(crate) amount_cents: i64,
}

impl Sums {
    /// A row's sums after the event; `None` when no order is left in them.
    fn after(row: Option<Self>, event: &Recorded<OrderEvent>) -> Option<Self> {
        let before = row.unwrap_or_default();
        let after = match Sale::of(&event.event) {
            Some(sale) => before.plus_order(sale.lines, sale.sign),
            None => before,
        };
        (after.orders != 0).then_some(after)
    }

    /// With one order more or less, of which these lines count.
    #[must_use]
    pub(crate) fn plus_order<'l>(
        self,
        lines: impl IntoIterator<Item = &'l Line> + Clone,
        sign: i64,
    ) -> Self {
        self.plus(Self {
            orders: sign,
            quantity: sign * quantity_of(lines.clone()),
            amount_cents: sign * amount_cents_of(lines),
        })
    }

    /// Both together.
    #[must_use]
    pub(crate) fn plus(self, other: Self) -> Self {
        Self {
            orders: self.orders.saturating_add(other.orders),
            quantity: self.quantity.saturating_add(other.quantity),
            amount_cents: self.amount_cents.saturating_add(other.amount_cents),
        }
    }
}

/// The sales of one UTC date of `placed_at`.
#[derive(Debug, Clone, PartialEq, Row)]
pub(crate) struct DaySales {
    #[row(key)]
    pub(crate) day: NaiveDate,
    pub(crate) orders: i64,
    pub(crate) quantity: i64,
    pub(crate) amount_cents: i64,
}

impl DaySales {
    pub(crate) fn sums(&self) -> Sums {
        let Self { orders, quantity, amount_cents, .. } = *self;
        Sums { orders, quantity, amount_cents }
    }
}

impl ReadModel for DaySales {
    const NAME: &'static str = "sales_by_day";
    type Event = OrderEvent;

    fn keys(event: &Recorded<OrderEvent>) -> Vec<NaiveDate> {
        Sale::of(&event.event).iter().map(|sale| sale.placed_at.date_naive()).collect()
    }

    fn fold(day: &NaiveDate, row: Option<Self>, event: &Recorded<OrderEvent>) -> Option<Self> {
        let Sums { orders, quantity, amount_cents } =
            Sums::after(row.map(|row| row.sums()), event)?;
        Some(Self { day: *day, orders, quantity, amount_cents })
    }
}

/// The sales to one customer.
#[derive(Debug, Clone, PartialEq, Row)]
pub(crate) struct CustomerSales {
    #[row(key)]
    pub(crate) customer: String,
    pub(crate) orders: i64,
    pub(crate) quantity: i64,
    pub(crate) amount_cents: i64,
}

impl CustomerSales {
    pub(crate) fn sums(&self) -> Sums {
        let Self { orders, quantity, amount_cents, .. } = *self;
        Sums { orders, quantity, amount_cents }
    }
}

impl ReadModel for CustomerSales {
    const NAME: &'static str = "sales_by_customer";
    type Event = OrderEvent;

    fn keys(event: &Recorded<OrderEvent>) -> Vec<String> {
        Sale::of(&event.event).iter().map(|sale| sale.customer.to_owned()).collect()
    }

    fn fold(customer: &String, row: Option<Self>, event: &Recorded<OrderEvent>) -> Option<Self> {
        let Sums { orders, quantity, amount_cents } =
            Sums::after(row.map(|row| row.sums()), event)?;
        Some(Self { customer: customer.clone(), orders, quantity, amount_cents })
    }
}
