//! The program `kafold`; see the library.

fn main() -> std::process::ExitCode {
    kafold_cli::main()
}
