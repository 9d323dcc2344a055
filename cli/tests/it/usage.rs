//! What the program says of itself, and to those who ask for what cannot be.

use crate::support;

use std::fs;
use std::io::Read;
use std::process::Stdio;

use support::{ended, kafold, run, wait_for};
use tempfile::TempDir;

#[test]
fn help_names_every_command() {
    let folder = TempDir::new().expect("a folder");
    let help = run(folder.path(), &["--help"]).ok();
    insta::assert_snapshot!("help", help);
    for command in ["status", "doctor", "migrate", "topic create", "topic check"] {
        let args: Vec<_> = command.split(' ').chain(["--help"]).collect();
        let help = run(folder.path(), &args).ok();
        for option in ["--log", "--database", "--json"] {
            assert!(help.contains(option), "{command}: {help}");
        }
    }
    insta::assert_snapshot!("tail_help", run(folder.path(), &["events", "tail", "-h"]).ok());
    insta::assert_snapshot!("show_help", run(folder.path(), &["stream", "show", "-h"]).ok());
}

/// The template itself is compiled and tested as the example `accounts`.
#[test]
fn a_new_service_is_a_package_that_cargo_can_resolve() {
    let folder = TempDir::new().expect("a folder");
    for name in ["Shop", "1shop", "a b", "", "../shop", &"a".repeat(51)] {
        run(folder.path(), &["new", name]).says(2, &["name of a service", "[a-z][a-z0-9-]*"]);
    }
    for name in ["build", "kafold-core"] {
        run(folder.path(), &["new", name]).says(2, &["choose another name"]);
    }
    run(folder.path(), &["new", "shop", "--kafold-path", "."]).says(2, &["--kafold-path DIR"]);
    let made = run(folder.path(), &["new", "shop", "--kafka"]).ok();
    assert!(made.contains("cd shop") && made.contains("cargo run"), "{made}");
    run(folder.path(), &["new", "shop"]).says(1, &["shop exists here already"]);
    run(folder.path(), &["new", "plain"]).ok();
    assert!(folder.path().join("shop/compose.yaml").is_file());
    assert!(!folder.path().join("plain/compose.yaml").exists());
    for (name, has_kafka) in [("shop", true), ("plain", false)] {
        let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
        let resolved = std::process::Command::new(cargo)
            .args(["tree", "--offline", "--prefix", "none"])
            .current_dir(folder.path().join(name))
            .output()
            .expect("cargo runs");
        let tree = String::from_utf8_lossy(&resolved.stdout);
        assert!(resolved.status.success(), "{}", String::from_utf8_lossy(&resolved.stderr));
        assert_eq!(tree.contains("kafold-kafka-store"), has_kafka, "{tree}");
    }
}

#[test]
fn what_cannot_be_is_wrong_usage() {
    let folder = TempDir::new().expect("a folder");
    let usage = |args: &[&str], words: &[&str]| run(folder.path(), args).says(2, words);
    usage(&[], &["Usage"]);
    usage(&["nothing"], &["nothing"]);
    usage(&["status"], &["kafold: ", "--log", "--database"]);
    usage(&["doctor"], &["kafold: ", "--log", "--database"]);
    usage(&["migrate"], &["--database", "KAFOLD_DATABASE"]);
    for command in [&["stream", "show", "order-1"][..], &["events", "tail"], &["topic", "check"]] {
        usage(command, &["kafold: ", "--log", "KAFOLD_LOG"]);
        let with_log = |url| [command, &["--log", url]].concat();
        usage(&with_log("mysql://u:secret@h/d"), &["kafold: ", "mysql://h/d", "sqlite://FILE"]);
        usage(&with_log("kafka://localhost/orders"), &["kafold: ", "localhost", "port"]);
        usage(&with_log("kafka://localhost:9092/orders?partition=3"), &["partition"]);
    }
    usage(&["migrate", "--database", "mysql://u:secret@h/d"], &["kafold: ", "postgres://"]);
    usage(&["topic", "create", "--log", "sqlite://a.db"], &["kafold: ", "kafka://"]);
    usage(&["topic", "check", "--log", "sqlite://a.db"], &["kafold: ", "kafka://"]);

    let log = ["--log", "sqlite://a.db"];
    let with = |args: &[&'static str]| [args, &log].concat();
    usage(&with(&["events", "tail", "--from", "3"]), &["kafold: ", "PARTITION:OFFSET", "3:1042"]);
    usage(&with(&["events", "tail", "--from", "0:-1"]), &["kafold: ", "0:-1"]);
    usage(&with(&["events", "tail", "--from", "0:1", "--from-beginning"]), &["--from-beginning"]);
    usage(&with(&["events", "tail", "--stream", "order"]), &["kafold: ", "order"]);
    usage(&with(&["stream", "show", "order"]), &["kafold: ", "CATEGORY-ID"]);
    usage(&with(&["stream", "show", "1", "--category", "Order"]), &["kafold: ", "[a-z]"]);
    usage(&with(&["stream", "show", "order-1", "--at", "0"]), &["--at"]);
    usage(&with(&["stream", "show", "order-1", "--at", "x"]), &["--at"]);
    usage(&with(&["stream", "show"]), &["<ID>"]);
    assert_eq!(fs::read_dir(folder.path()).expect("a folder").count(), 0, "something was made");
}

#[test]
fn a_url_of_the_environment_is_as_good_and_no_password_is_told() {
    let folder = TempDir::new().expect("a folder");
    let mut command = kafold(folder.path(), &["migrate"]);
    let url = "postgres://u:secret@127.0.0.1:1/d";
    let refused = ended(command.env("KAFOLD_DATABASE", url).output().expect("the program starts"));
    refused.only_says(1, &["postgres://u@127.0.0.1:1/d is unavailable"]);
    assert!(!refused.stderr.contains("secret"), "{refused:?}");
    let mut command = kafold(folder.path(), &["migrate", "--help"]);
    let help = ended(command.env("KAFOLD_DATABASE", url).output().expect("the program starts"));
    assert!(!help.ok().contains("secret"));
}

#[test]
fn a_secret_in_the_wrong_place_of_the_command_line_is_not_repeated() {
    const CANARY: &str = "Canary-17";
    let folder = TempDir::new().expect("a folder");
    let url = format!("kafka://ann:{CANARY}@127.0.0.1:1/o?password={CANARY}");
    let log = format!("--log={url}");
    for args in [
        &["status", &url][..],
        &["status", "--logg", &url],
        &["status", "--log", &url, "--database", &url],
        &["status", "--log", "sqlite://a.db", "--database", CANARY],
        &["status", "--log", CANARY],
        &[&url, "status"],
        &["stream", "show", "order-1", "--at", &url],
        &["events", "tail", &log, CANARY],
        &["completions", &url],
        &["status", "--json", &url],
    ] {
        let ended = run(folder.path(), args);
        assert_ne!(ended.code, Some(0), "{args:?}");
        let said = format!("{}{}", ended.stdout, ended.stderr);
        assert!(!said.contains(CANARY), "{args:?}: {said}");
    }
}

#[test]
fn completions_and_man_pages_are_made_for_every_shell_and_command() {
    let folder = TempDir::new().expect("a folder");
    for shell in ["bash", "zsh", "fish"] {
        let script = run(folder.path(), &["completions", shell]).ok();
        assert!(script.contains("kafold") && script.contains("from-beginning"), "{script}");
    }
    let script = run(folder.path(), &["completions", "bash", "--json"]).json();
    assert_eq!(script["shell"], "bash");
    run(folder.path(), &["completions", "ksh"]).says(2, &["ksh"]);

    assert!(run(folder.path(), &["man"]).ok().contains(".TH kafold"));
    assert!(run(folder.path(), &["man", "--json"]).json()["page"].is_string());
    run(folder.path(), &["man", "--out", "absent"]).only_says(1, &["absent", "exists"]);
    run(folder.path(), &["man", "--out", "."]).ok();
    assert!(folder.path().join("kafold.1").is_file());
    assert!(folder.path().join("kafold-events-tail.1").is_file());
}

#[test]
fn a_closed_pipe_is_no_failure() {
    let folder = TempDir::new().expect("a folder");
    let mut command = kafold(folder.path(), &["completions", "bash"]);
    let mut child =
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the program starts");
    // Longer than what a pipe holds, so the program notices.
    drop(child.stdout.take());
    let status = wait_for("the program ends", || child.try_wait().expect("a child"));
    let mut said = String::new();
    let mut stderr = child.stderr.take().expect("piped");
    stderr.read_to_string(&mut said).expect("text");
    assert_eq!((status.code(), said.as_str()), (Some(0), ""));
}

#[test]
fn control_characters_of_arguments_reach_no_terminal() {
    let folder = TempDir::new().expect("a folder");
    for args in
        [&["st\u{1b}[31m"][..], &["status", "\u{1b}]0;title\u{7}"], &["status", "--x\u{9b}6n"]]
    {
        let ended = run(folder.path(), args);
        assert_eq!(ended.code, Some(2), "{ended:?}");
        assert!(!ended.stderr.contains(|c: char| c.is_control() && c != '\n'), "{ended:?}");
    }
}
