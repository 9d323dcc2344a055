use kafold_core::Row;

#[derive(Row, Clone, PartialEq)]
struct Keyless {
    amount_cents: i64,
}

#[derive(Row, Clone, PartialEq)]
struct TwoKeys {
    #[row(key)]
    day: String,
    #[row(key)]
    sku: String,
}

#[derive(Row, Clone, PartialEq)]
struct JsonKey {
    #[row(key, json)]
    day: Vec<u8>,
}

fn main() {}
