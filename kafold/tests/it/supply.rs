//! The allowed dependencies: the licences, bans and sources of `deny.toml`.
//!
//! `cargo deny`, where installed, runs the same checks and more; building `cargo deny` takes longer
//! than all of our checks.

use std::collections::BTreeSet;

use cargo_metadata::{CargoOpt, MetadataCommand};
use serde::Deserialize;
use spdx::{Expression, ParseMode};

const RULES: &str = include_str!("../../../deny.toml");
const REGISTRY: &str = "registry+https://github.com/rust-lang/crates.io-index";

#[derive(Deserialize)]
struct Rules {
    licenses: Licenses,
    bans: Bans,
    sources: Sources,
}

#[derive(Deserialize)]
struct Licenses {
    allow: BTreeSet<String>,
}

#[derive(Deserialize)]
struct Bans {
    deny: Vec<Ban>,
}

#[derive(Deserialize)]
struct Ban {
    #[serde(rename = "crate")]
    name: String,
    /// Crates which may depend on the banned crate all the same.
    #[serde(default)]
    wrappers: BTreeSet<String>,
    #[serde(default, rename = "deny-multiple-versions")]
    one_version: bool,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Sources {
    allow_registry: Vec<String>,
}

/// A crate in the graph.
#[derive(Clone)]
struct Found {
    name: String,
    license: String,
    /// `None` for a crate of this workspace.
    source: Option<String>,
    dependents: BTreeSet<String>,
}

fn rules() -> Rules {
    toml::from_str(RULES).expect("deny.toml")
}

/// Returns all crates of all features, on this platform.
fn crates() -> Vec<Found> {
    let platform = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let metadata = MetadataCommand::new()
        .features(CargoOpt::AllFeatures)
        .other_options(["--offline", "--locked", "--filter-platform", &platform].map(String::from))
        .exec()
        .expect("cargo metadata");
    let nodes = &metadata.resolve.as_ref().expect("a graph").nodes;
    let dependents = |id: &cargo_metadata::PackageId| {
        let named = nodes.iter().filter(|node| node.dependencies.contains(id));
        named.map(|node| metadata[&node.id].name.to_string()).collect()
    };
    let found = |node: &cargo_metadata::Node| {
        let package = &metadata[&node.id];
        Found {
            name: package.name.to_string(),
            license: package.license.clone().unwrap_or_default(),
            source: package.source.as_ref().map(|source| source.repr.clone()),
            dependents: dependents(&node.id),
        }
    };
    nodes.iter().map(found).collect()
}

/// Returns one sentence for each violation of a rule.
fn violations(rules: &Rules, crates: &[Found]) -> Vec<String> {
    let mut violations = Vec::new();
    for Found { name, license, source, dependents } in crates {
        let is_allowed = Expression::parse_mode(license, ParseMode::LAX).is_ok_and(|expression| {
            expression.evaluate(|wanted| {
                wanted.exception.is_none()
                    && rules.licenses.allow.contains(&wanted.license.to_string())
            })
        });
        if !is_allowed {
            violations.push(format!("{name} has the licence {license:?}"));
        }
        let registries = &rules.sources.allow_registry;
        let is_known = |source: &String| {
            registries.iter().any(|registry| *source == format!("registry+{registry}"))
        };
        if !source.as_ref().is_none_or(is_known) {
            violations.push(format!("{name} comes from {source:?}"));
        }
        for ban in rules.bans.deny.iter().filter(|ban| ban.name == *name) {
            let versions = crates.iter().filter(|other| other.name == *name).count();
            let is_wrapped = !ban.wrappers.is_empty() && dependents.is_subset(&ban.wrappers);
            if ban.one_version {
                if versions > 1 {
                    violations.push(format!("{name} is there in {versions} versions"));
                }
            } else if !is_wrapped {
                violations.push(format!("{name} is banned, and {dependents:?} depend on it"));
            }
        }
    }
    violations
}

#[test]
fn every_crate_keeps_the_rules_of_licences_bans_and_sources() {
    let (rules, crates) = (rules(), crates());
    assert!(crates.len() > 100, "the graph is whole: {}", crates.len());
    assert_eq!(violations(&rules, &crates), [""; 0]);
}

#[test]
fn a_crate_that_breaks_a_rule_is_named() {
    let rules = rules();
    let refused = |found: &[Found], words: &[&str]| {
        let said = violations(&rules, found).join("; ");
        for word in words {
            assert!(said.contains(word), "{word:?} is not in {said:?}");
        }
    };
    let good = Found {
        name: "good".into(),
        license: "MIT/Apache-2.0".into(),
        source: Some(REGISTRY.into()),
        dependents: ["orders".to_owned()].into(),
    };
    assert_eq!(violations(&rules, std::slice::from_ref(&good)), [""; 0]);
    let named = |name: &str| Found { name: name.into(), ..good.clone() };
    let licensed = |license: &str| Found { license: license.into(), ..named("strict") };
    for license in ["GPL-3.0-only", "MIT AND GPL-2.0-or-later", "AGPL-3.0", "", "no licence"] {
        refused(&[licensed(license)], &["strict has the licence"]);
    }
    assert_eq!(violations(&rules, &[licensed("GPL-2.0-only OR MIT")]), [""; 0]);
    // A second OpenSSL, a second library beside rustls, and ring through another crate.
    for second in ["openssl", "openssl-src", "native-tls", "aws-lc-rs", "openssl-sys", "ring"] {
        refused(&[named(second)], &[second, "is banned", "orders"]);
    }
    let wrapped = |by: &str| Found { dependents: [by.to_owned()].into(), ..named("openssl-sys") };
    assert_eq!(violations(&rules, &[wrapped("rdkafka-sys")]), [""; 0]);
    refused(&[named("rustls"), named("rustls")], &["rustls is there in 2 versions"]);
    for source in ["git+https://example.org/x", "registry+https://example.org/index"] {
        refused(&[Found { source: Some(source.into()), ..good.clone() }], &["good comes from"]);
    }
}
