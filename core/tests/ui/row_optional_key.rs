use kafold_core::Row;

#[derive(Row, Clone, PartialEq)]
struct Sales {
    #[row(key)]
    day: Option<String>,
}

fn main() {}
