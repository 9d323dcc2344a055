use kafold_core::Row;
use kafold_core::row::Merge;

#[derive(Row, Clone, PartialEq)]
struct Weights {
    #[row(key)]
    day: String,
    #[row(sum)]
    weight: f64,
    #[row(min)]
    open: bool,
    #[row(sum)]
    note: Option<i64>,
}

#[derive(Row, Clone, PartialEq)]
struct Contradictions {
    #[row(key, sum)]
    day: i64,
    #[row(min, max)]
    span: i64,
    #[row(sum, json)]
    lines: Vec<i64>,
}

#[derive(Row, Clone, PartialEq)]
struct Partly {
    #[row(key)]
    day: String,
    #[row(sum)]
    count: i64,
    last: String,
}

fn merged<R: Merge>(_: R) {}

fn partly(row: Partly) {
    merged(row);
}

fn main() {}
