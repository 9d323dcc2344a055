use kafold_core::Row;

#[derive(Row, Clone, PartialEq)]
struct Visits {
    #[row(key)]
    visitor: u64,
}

fn main() {}
