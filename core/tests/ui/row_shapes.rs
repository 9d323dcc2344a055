use kafold_core::Row;

#[derive(Row, Clone, PartialEq)]
struct Tuple(#[row(key)] String);

#[derive(Row, Clone, PartialEq)]
enum Either {
    One { day: String },
}

#[derive(Row, Clone, PartialEq)]
struct Generic<T> {
    #[row(key)]
    day: T,
}

fn main() {}
