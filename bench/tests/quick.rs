//! The smallest subset: it works, and nothing is slower than a baseline by an order.

use std::path::Path;

use kafold_bench::harness::{Bench, Comparison, Size};
use kafold_bench::rows;
use kafold_bench::servers::Servers;

/// The rows, and below which ratio something is broken: a tenth of what a debug build reaches here, not
/// a goal.
const ROWS: [(&str, f64); 7] = [
    ("R1", 0.01),
    ("R3", 0.5),
    ("R4", 0.03),
    ("R5", 0.03),
    ("R6", 0.0007),
    ("R7", 0.02),
    ("R10", 0.05),
];

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_slower_by_an_order() {
    let variables = ["KAFOLD_TEST_KAFKA", "KAFOLD_TEST_POSTGRES"].map(std::env::var);
    let [Ok(brokers), Ok(postgres)] = variables else {
        let all = std::env::var_os("KAFOLD_TEST_REQUIRE_ALL").is_some();
        assert!(
            !all,
            "KAFOLD_TEST_KAFKA or KAFOLD_TEST_POSTGRES is absent, and nothing may be skipped"
        );
        eprintln!(
            "skipped the benchmarks: KAFOLD_TEST_KAFKA and KAFOLD_TEST_POSTGRES name no servers"
        );
        return;
    };
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let bench =
        Bench::new(Size::Test, Servers::given("test-bench", brokers, postgres), folder, None);
    for (row, least) in ROWS {
        let measured = rows::run(&bench, row).await;
        measured.unwrap_or_else(|failure| panic!("{row}: {failure}"));
        let compared = bench.compared(row);
        assert!(!compared.is_empty(), "{row} compared nothing");
        for Comparison { case, figures, .. } in compared {
            let figure = figures.iter().find(|figure| figure.metric == "per_s");
            let ratio = figure.and_then(|figure| figure.ratio).map(|ratio| ratio.median);
            let ratio = ratio.unwrap_or_else(|| panic!("{row}, {case}: no ratio"));
            assert!(ratio >= least, "{row}, {case}: {ratio:.3} of the baseline, below {least}");
        }
    }
}
