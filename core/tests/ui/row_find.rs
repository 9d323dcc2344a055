use kafold_core::Row;

#[derive(Row, Clone, PartialEq)]
struct Sales {
    #[row(key)]
    day: String,
    #[row(index)]
    count: i64,
    amount: i64,
}

#[derive(Row, Clone, PartialEq)]
struct Customers {
    #[row(key)]
    customer: String,
}

fn find(_: kafold_core::row::Condition<Sales>) {}

fn main() {
    find(Sales::day.eq("2024-10-04"));
    find(Sales::amount.eq(1));
    find(Sales::count.eq("one"));
    find(Customers::customer.eq("c1"));
}
