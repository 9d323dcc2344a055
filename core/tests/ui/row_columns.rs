use kafold_core::Row;

#[derive(Row, Clone, PartialEq)]
struct Sales {
    #[row(key, index)]
    day: String,
    #[row(json, index)]
    lines: Vec<String>,
    #[row(unique)]
    sku: String,
    kafold_amount: i64,
    größe: i64,
    _hidden: i64,
    aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa: i64,
}

fn main() {}
