use kafold_core::Row;

#[derive(Row, Clone, PartialEq)]
struct Sales {
    #[row(key)]
    day: String,
    lines: Vec<String>,
}

fn main() {}
