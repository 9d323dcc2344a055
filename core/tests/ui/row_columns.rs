use kafold_core::Row;

#[derive(Row, Clone, PartialEq)]
struct Sales {
    #[row(key, index)]
    day: String,
    #[row(json, index)]
    lines: Vec<String>,
    #[row(unique)]
    sku: String,
    kafold_amount: u64,
    größe: u64,
    _hidden: u64,
    aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa: u64,
}

fn main() {}
