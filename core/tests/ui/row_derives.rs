use kafold_core::Row;

#[derive(Row)]
struct WithoutCloneAndPartialEq {
    #[row(key)]
    day: String,
}

#[derive(Row, Clone, PartialEq)]
struct NumberedStream {
    #[row(stream)]
    id: i64,
}

#[derive(Clone, PartialEq)]
struct Lines(Vec<String>);

#[derive(Row, Clone, PartialEq)]
struct JsonWithoutSerde {
    #[row(key)]
    day: String,
    #[row(json)]
    lines: Lines,
}

fn main() {}
