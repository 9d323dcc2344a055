//! `kafold new`: a service from a template, `examples/accounts` under another name.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::json;

use crate::error::Error;
use crate::output::Output;

/// The checkout that this program was built from.
const CHECKOUT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");
/// Longest name of a service: a topic name has its prefix, and 249 characters in all.
const NAME_CHARS_MAX: usize = 50;

/// Names that cargo refuses for a program.
const RESERVED: [&str; 5] = ["build", "deps", "examples", "incremental", "test"];

const MAIN: &str = include_str!("../templates/main.rs");
const CARGO: &str = include_str!("../templates/Cargo.toml.txt");
const README: &str = include_str!("../templates/README.md.txt");
const README_KAFKA: &str = include_str!("../templates/kafka.md.txt");
const COMPOSE: &str = include_str!("../templates/compose.yaml");

#[derive(Debug, clap::Args)]
pub(crate) struct NewArgs {
    /// The name of the service and of the folder that is made: [a-z][a-z0-9-]*.
    name: String,
    /// Adds Kafka to the build, and a compose file with a broker and a PostgreSQL.
    #[arg(long)]
    kafka: bool,
    /// The checkout of kafold on which the service depends. Default: the checkout that this program was built
    /// from.
    #[arg(long, value_name = "DIR")]
    kafold_path: Option<PathBuf>,
}

pub(crate) fn run(args: &NewArgs, out: &mut Output) -> Result<(), Error> {
    let name = &args.name;
    let is_name = name.starts_with(|c: char| c.is_ascii_lowercase())
        && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-')
        && name.len() <= NAME_CHARS_MAX;
    if !is_name {
        return Err(Error::usage(format!(
            "{name:?} cannot be the name of a service: [a-z][a-z0-9-]*, at most {NAME_CHARS_MAX} characters"
        )));
    }
    if RESERVED.contains(&name.as_str()) || name == "kafold" || name.starts_with("kafold-") {
        return Err(Error::usage(format!(
            "{name} is the name of a folder of cargo or of a crate of kafold: choose another name"
        )));
    }
    let checkout = checkout(args.kafold_path.as_deref())?;
    let folder = Path::new(name);
    match fs::create_dir(folder) {
        Ok(()) => {}
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
            return Err(Error::failed(format!(
                "{name} exists here already: choose another name, or remove it"
            )));
        }
        Err(error) => return Err(failed(folder, &error)),
    }
    for (path, text) in files(name, args.kafka, &checkout.to_string_lossy()) {
        let path = folder.join(path);
        let parent = path.parent().unwrap_or(folder);
        let written = fs::create_dir_all(parent).and_then(|()| fs::write(&path, text));
        written.map_err(|error| failed(&path, &error))?;
    }
    // The versions that kafold is tested with.
    let lock = folder.join("Cargo.lock");
    let copied = fs::copy(checkout.join("Cargo.lock"), &lock);
    copied.map_err(|error| failed(&lock, &error))?;
    match out.json {
        true => out.document(&json!({ "name": name, "folder": folder, "kafold": checkout })),
        false => out.line(&format!(
            "{name}/ has a service with its tests. Next:\n\n  cd {name}\n  cargo run     # serves on http://127.0.0.1:8080\n  \
             cargo test\n\n{name}/README.md tells more."
        )),
    }
}

/// Returns the absolute path of a checkout of kafold.
fn checkout(path: Option<&Path>) -> Result<PathBuf, Error> {
    let path = path.unwrap_or(Path::new(CHECKOUT));
    let is_checkout = path.join("kafold/Cargo.toml").is_file() && path.join("Cargo.lock").is_file();
    let absolute = path.canonicalize().ok().filter(|_| is_checkout);
    absolute.ok_or_else(|| {
        Error::usage(format!(
            "{} is no checkout of kafold: name one with --kafold-path DIR",
            path.display()
        ))
    })
}

/// Returns the files of a service with this name, as paths in its folder and texts.
fn files(name: &str, with_kafka: bool, checkout: &str) -> Vec<(&'static str, String)> {
    let named = |template: &str| {
        template
            .replace("\"accounts\"", &format!("\"{name}\""))
            .replace("accounts.db", &format!("{name}.db"))
            .replace("/accounts KAFOLD", &format!("/{name} KAFOLD"))
            .replace("# accounts\n", &format!("# {name}\n"))
    };
    let features = match with_kafka {
        true => r#""embedded", "kafka", "projections", "tls""#,
        false => r#""embedded", "projections""#,
    };
    let checkout = checkout.replace('\\', "\\\\").replace('"', "\\\"");
    let cargo = named(CARGO).replace("FEATURES", features).replace("KAFOLD", &checkout);
    let readme = named(README) + &if with_kafka { named(README_KAFKA) } else { String::new() };
    let ignored = format!("/target\n{name}.db*\n");
    let mut files = vec![
        ("Cargo.toml", cargo),
        ("README.md", readme),
        (".gitignore", ignored),
        ("src/main.rs", named(MAIN)),
    ];
    if with_kafka {
        files.push(("compose.yaml", COMPOSE.to_owned()));
    }
    files
}

fn failed(path: &Path, error: &std::io::Error) -> Error {
    Error::failed(format!("cannot write {}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example is compiled and tested as a member of the workspace.
    #[test]
    fn the_template_is_the_example() {
        assert_eq!(MAIN, include_str!("../../examples/accounts/src/main.rs"));
    }

    #[test]
    fn a_service_has_its_own_name_where_it_counts() {
        let files: std::collections::BTreeMap<_, _> =
            files("shop", true, "/c").into_iter().collect();
        let main = &files["src/main.rs"];
        assert!(main.contains("open_from_env(\"sqlite://shop.db\")"), "{main}");
        assert!(main.contains("Service::new(\"shop\""), "{main}");
        let cargo = &files["Cargo.toml"];
        assert!(
            cargo.contains("name = \"shop\"") && cargo.contains("path = \"/c/kafold\""),
            "{cargo}"
        );
        assert!(files["README.md"].contains("kafka://localhost:9092/shop KAFOLD"));
        assert!(files.values().all(|text| !text.contains("FEATURES") && !text.contains("KAFOLD/")));
    }
}
