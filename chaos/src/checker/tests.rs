use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use super::{ANOMALIES, check};
use crate::history::Line;

fn histories() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("histories");
    let entries = fs::read_dir(folder).expect("the folder of histories");
    entries.map(|entry| entry.expect("an entry").path()).collect()
}

fn read(path: &Path) -> Vec<Line> {
    let text = fs::read_to_string(path).expect("a history");
    let line = |line: &str| {
        serde_json::from_str(line)
            .unwrap_or_else(|error| panic!("{}: {error}: {line}", path.display()))
    };
    text.lines().map(line).collect()
}

/// `ANOMALY.jsonl` or `ANOMALY.how.jsonl`; those that are good begin so.
fn name(path: &Path) -> &str {
    let name = path.file_name().and_then(|name| name.to_str()).expect("a name");
    name.split('.').next().unwrap_or_default()
}

#[test]
fn every_bad_history_is_flagged_and_the_good_ones_are_not() {
    for path in histories() {
        let found = check(&read(&path)).anomalies;
        let names: BTreeSet<_> = found.iter().map(|anomaly| anomaly.name).collect();
        let expected = BTreeSet::from([name(&path)]);
        let is_good = name(&path).starts_with("good");
        let file = path.display();
        assert!(is_good && found.is_empty() || names == expected, "{file}: {found:#?}");
    }
}

#[test]
fn every_anomaly_has_its_history() {
    let paths = histories();
    let there: BTreeSet<_> = paths.iter().map(|path| name(path)).collect();
    for anomaly in ANOMALIES {
        assert!(there.contains(anomaly), "no history shows {anomaly}");
    }
}
