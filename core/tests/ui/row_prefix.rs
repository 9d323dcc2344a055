use kafold_core::Row;
use kafold_core::row::KeyPrefix;

#[derive(Row, Clone, PartialEq)]
struct Sales {
    #[row(key)]
    day: String,
    #[row(key)]
    sku: i64,
    amount: i64,
}

fn prefix(_: impl KeyPrefix<<Sales as Row>::Key>) {}

fn main() {
    prefix(("2024-10-04",));
    prefix(("2024-10-04", 5));
    prefix("2024-10-04");
    Sales::sku.eq(5);
}
