//! The documented metrics, the dashboard and the alert rules against the code.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    let kafold = Path::new(env!("CARGO_MANIFEST_DIR"));
    kafold.parent().expect("in the workspace").to_owned()
}

fn read(path: impl AsRef<Path>) -> String {
    let path = root().join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Every source file that is part of a crate, tests aside.
fn sources() -> Vec<PathBuf> {
    let crates = ["core", "embedded-store", "kafka-store", "kafold", "migrations", "projections"];
    let mut folders: Vec<_> = crates.iter().map(|name| root().join(name).join("src")).collect();
    folders.push(root().join("axum/src"));
    folders.push(root().join("examples/orders/src"));
    let mut files = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("a folder of ours") {
            let path = entry.expect("readable").path();
            match path.is_dir() {
                true => folders.push(path),
                false => files.push(path),
            }
        }
    }
    files
}

/// The names that stand in the macros, with their kinds.
fn in_code() -> BTreeSet<(String, &'static str)> {
    let mut found = BTreeSet::new();
    for file in sources() {
        let text = fs::read_to_string(&file).expect("text");
        for kind in ["counter", "gauge", "histogram"] {
            let call = format!("{kind}!(");
            for after in text.split(&call).skip(1) {
                let name =
                    after.trim_start().strip_prefix('"').and_then(|name| name.split('"').next());
                let name = name.unwrap_or_else(|| panic!("{}: {kind}! of no name", file.display()));
                found.insert((name.to_owned(), kind));
            }
        }
    }
    found
}

/// The rows of the table in the documentation.
fn documented() -> BTreeSet<(String, &'static str)> {
    let text = read("docs/operations.md");
    let row = |line: &str| {
        let cells: Vec<_> = line.split('|').map(str::trim).collect();
        let name = cells.get(1)?.strip_prefix('`')?.strip_suffix('`')?.to_owned();
        let kind = ["counter", "gauge", "histogram"].into_iter().find(|kind| cells[2] == *kind)?;
        Some((name, kind))
    };
    text.lines().filter_map(row).collect()
}

#[test]
fn every_metric_is_documented_and_every_documented_one_is_there() {
    let (code, documents) = (in_code(), documented());
    let missing: Vec<_> = code.difference(&documents).collect();
    let gone: Vec<_> = documents.difference(&code).collect();
    assert!(missing.is_empty(), "not in docs/operations.md: {missing:?}");
    assert!(gone.is_empty(), "in docs/operations.md only: {gone:?}");
    assert!(code.len() > 30, "the code was read");
}

#[test]
fn dashboard_and_alerts_use_metrics_that_there_are() {
    let dashboard = read("ops/grafana.json");
    let parsed: serde_json::Value = serde_json::from_str(&dashboard).expect("JSON");
    let panels = parsed["panels"].as_array().expect("panels");
    assert!(panels.iter().all(|panel| panel["targets"][0]["expr"].is_string()), "each asks");
    let known = documented();
    for (file, text) in
        [("ops/grafana.json", dashboard), ("ops/alerts.yml", read("ops/alerts.yml"))]
    {
        let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        let used: BTreeSet<_> =
            words.filter(|word| word.starts_with("kafold_") || word.starts_with("http_")).collect();
        assert!(used.len() >= 6, "{file} was read: {used:?}");
        for name in used {
            let is_known = known.iter().any(|(known, kind)| match *kind {
                "histogram" => ["_bucket", "_count", "_sum"]
                    .iter()
                    .any(|suffix| name.strip_suffix(suffix) == Some(known)),
                _ => name == known,
            });
            assert!(is_known, "{file} asks for {name}, which there is not");
        }
    }
}
