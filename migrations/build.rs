//! Tells cargo to look for new migration files: the macro that reads the folders cannot.

fn main() {
    println!("cargo::rerun-if-changed=postgres");
    println!("cargo::rerun-if-changed=sqlite");
}
