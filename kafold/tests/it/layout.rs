//! The arrows between the crates, and who may name what.

use std::collections::{BTreeMap, BTreeSet};

use cargo_metadata::{DependencyKind, Metadata, MetadataCommand};

/// Which crates of ours each crate may depend on, directly.
const ARROWS: &[(&str, &[&str])] = &[
    ("kafold-core-macros", &[]),
    ("kafold-core", &["kafold-core-macros"]),
    ("kafold-migrations", &["kafold-core"]),
    ("kafold-embedded-store", &["kafold-core", "kafold-migrations"]),
    ("kafold-kafka-credentials", &[]),
    ("kafold-kafka-store", &["kafold-core", "kafold-kafka-credentials"]),
    ("kafold-projections", &["kafold-core", "kafold-migrations"]),
    (
        "kafold",
        &[
            "kafold-core",
            "kafold-migrations",
            "kafold-embedded-store",
            "kafold-kafka-store",
            "kafold-projections",
        ],
    ),
    ("kafold-bench", &["kafold"]),
    ("kafold-chaos", &["kafold"]),
    ("kafold-cli", &["kafold"]),
    ("kafold-axum", &["kafold"]),
    ("accounts", &["kafold", "kafold-axum"]),
    ("orders", &["kafold", "kafold-axum", "kafold-cli"]),
];

/// Foreign crates that only these crates of ours may name.
const NAMED_ONLY_BY: &[(&str, &[&str])] = &[
    // The campaign reads the log as a foreign consumer does, and baselines go without us.
    (
        "rdkafka",
        &["kafold-kafka-store", "kafold-kafka-credentials", "kafold-chaos", "kafold-bench"],
    ),
    ("rdkafka-sys", &["kafold-kafka-credentials"]),
    ("sqlx", &["kafold-migrations", "kafold-embedded-store", "kafold-projections"]),
    ("opentelemetry", &["kafold-core", "kafold"]),
    ("tracing-opentelemetry", &["kafold-core", "kafold"]),
    ("opentelemetry_sdk", &["kafold"]),
    ("opentelemetry-otlp", &["kafold"]),
    ("hyper", &["kafold-axum"]),
];

fn metadata() -> Metadata {
    MetadataCommand::new()
        .no_deps()
        .other_options(["--offline".into()])
        .exec()
        .expect("cargo metadata")
}

fn dependencies(metadata: &Metadata) -> BTreeMap<String, BTreeSet<String>> {
    let of = |package: &cargo_metadata::Package| {
        let normal = package.dependencies.iter().filter(|d| d.kind == DependencyKind::Normal);
        normal.map(|dependency| dependency.name.clone()).collect()
    };
    metadata.packages.iter().map(|package| (package.name.to_string(), of(package))).collect()
}

#[test]
fn arrows_between_the_crates_only_point_down() {
    let dependencies = dependencies(&metadata());
    let ours: BTreeSet<_> = dependencies.keys().cloned().collect();
    let known: BTreeSet<_> = ARROWS.iter().map(|(name, _)| name.to_string()).collect();
    assert_eq!(ours, known, "a crate was added or removed: say in ARROWS what it may depend on");
    for (name, allowed) in ARROWS {
        let named: BTreeSet<_> =
            dependencies[*name].intersection(&ours).map(String::as_str).collect();
        let allowed: BTreeSet<_> = allowed.iter().copied().collect();
        assert!(named.is_subset(&allowed), "{name} depends on {named:?}, allowed are {allowed:?}");
    }
}

#[test]
fn foreign_crates_stay_with_the_crate_that_owns_them() {
    for (name, dependencies) in dependencies(&metadata()) {
        for (foreign, owners) in NAMED_ONLY_BY {
            let names_it = dependencies.contains(*foreign);
            assert!(!names_it || owners.contains(&name.as_str()), "{name} names {foreign}");
        }
    }
}
