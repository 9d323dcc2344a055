//! A fuzzer over the OpenAPI document finds no failure and no undocumented answer.

use std::path::Path;
use std::process::Command;

use crate::support::Stack;

/// Time of the fuzzer, in seconds.
const SECONDS: &str = "120";

#[test]
fn a_fuzzer_finds_no_failure_and_no_undocumented_answer() {
    if std::env::var_os("KAFOLD_TEST_REQUIRE_ALL").is_none() {
        eprintln!("skipped: dev/test runs the fuzzer, which it installs from PyPI");
        return;
    }
    let service = Stack::embedded().serve();
    let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../dev/schemathesis");
    let url = format!("{}/openapi.json", service.url());
    let ended = Command::new(program).args([&url, SECONDS]).output().expect("dev/schemathesis");
    let (report, errors) =
        (String::from_utf8_lossy(&ended.stdout), String::from_utf8_lossy(&ended.stderr));
    assert!(ended.status.success(), "{report}\n{errors}");
    assert!(report.contains("12 selected"), "{report}");
    assert_eq!(service.get("/health/ready").status, 200);
}
