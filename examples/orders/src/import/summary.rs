//! What the file adds up to, beside what the service reports.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use kafold::{Offset, Partition, Position};
use serde_json::Value;

use super::client::{Client, ClientError};
use super::file::{Purchase, SKU};

/// The sums of a file or of the reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Totals {
    orders: i64,
    amount_cents: i64,
    quantity: i64,
    customers: i64,
}

impl Totals {
    pub(super) fn of(purchases: &[Purchase]) -> Self {
        let customers: BTreeSet<&str> = purchases.iter().map(|one| one.customer.as_str()).collect();
        Self {
            orders: purchases.len() as i64,
            // In range: the file's size bounds the purchases, the order's limits each of them.
            amount_cents: purchases.iter().map(|one| one.amount_cents).sum(),
            quantity: purchases.iter().map(|one| one.quantity).sum(),
            customers: customers.len() as i64,
        }
    }
}

/// Both, side by side.
#[derive(Debug)]
pub(super) struct Comparison {
    file: Totals,
    service: Totals,
    /// The service holds orders of other articles too: then its customers are not the file's alone.
    has_others: bool,
}

impl Comparison {
    /// Whether the service reports exactly what the file has.
    pub(super) fn is_equal(&self) -> bool {
        let customers = if self.has_others { self.file.customers } else { self.service.customers };
        self.file == Totals { customers, ..self.service }
    }
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { file, service, has_others } = self;
        writeln!(f, "{:<10} {:>15} {:>15}", "", "file", "service")?;
        let rows = [
            ("orders", file.orders, service.orders),
            ("cents", file.amount_cents, service.amount_cents),
            ("CDs", file.quantity, service.quantity),
            ("customers", file.customers, service.customers),
        ];
        for (name, in_file, in_service) in rows {
            let is_compared = name != "customers" || !has_others;
            let mark = if is_compared && in_file != in_service { "  differs" } else { "" };
            writeln!(f, "{name:<10} {in_file:>15} {in_service:>15}{mark}")?;
        }
        if *has_others {
            writeln!(
                f,
                "The service holds other orders too: compared by sku {SKU:?}, customers left out."
            )?;
        }
        if self.is_equal() {
            write!(f, "The service reports what the file has.")
        } else {
            write!(
                f,
                "They differ: orders that were cancelled since, or other orders of sku {SKU:?}."
            )
        }
    }
}

/// Waits until the reports have seen everything up to these positions, and compares.
pub(super) async fn compare(
    client: &Client,
    file: Totals,
    positions: &BTreeMap<Partition, Offset>,
) -> Result<Comparison, ClientError> {
    let tokens: Vec<String> = positions
        .iter()
        .map(|(&partition, &offset)| Position { partition, offset }.to_string())
        .collect();
    let report = async |by: &str| {
        let after = tokens.join(",");
        client.query(&format!("reports/sales?by={by}&after={after}")).await
    };
    // Compared with nothing of the file, but whoever reads it next finds it complete too.
    report("day").await?;
    let by_sku = report("sku").await?;
    let by_customer = report("customer").await?;
    let rows = |report: &Value| report["rows"].as_array().cloned().unwrap_or_default();
    let of_sku = rows(&by_sku).into_iter().find(|row| row["key"] == SKU).unwrap_or_default();
    let number = |value: &Value| value.as_i64().unwrap_or_default();
    let service = Totals {
        orders: number(&of_sku["orders"]),
        amount_cents: number(&of_sku["amount_cents"]),
        quantity: number(&of_sku["quantity"]),
        customers: rows(&by_customer).len() as i64,
    };
    let has_others = number(&by_sku["total"]["orders"]) != service.orders;
    Ok(Comparison { file, service, has_others })
}
