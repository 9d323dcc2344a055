use kafold_core::Row;

#[derive(Row, Clone, PartialEq)]
struct Keyless {
    amount_cents: i64,
}

#[derive(Row, Clone, PartialEq)]
struct FiveKeys {
    #[row(key)]
    year: i32,
    #[row(key)]
    month: i32,
    #[row(key)]
    day: i32,
    #[row(key)]
    hour: i32,
    #[row(key)]
    sku: String,
}

#[derive(Row, Clone, PartialEq)]
struct StreamAndSku {
    #[row(stream)]
    order_id: String,
    #[row(key)]
    sku: String,
}

#[derive(Row, Clone, PartialEq)]
struct JsonKey {
    #[row(key, json)]
    day: Vec<u8>,
}

#[derive(Row, Clone, PartialEq)]
struct RealKey {
    #[row(key)]
    day: String,
    #[row(key)]
    weight: f64,
}

fn main() {}
