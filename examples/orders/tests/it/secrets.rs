//! A password given in any form appears in no output.

use crate::support;

use std::fs;
use std::os::unix::fs::PermissionsExt;

use support::{Stack, orders, run};

const CANARY: &str = "Canary-17-hunter2";

#[test]
fn a_password_is_shown_nowhere_however_it_was_given() {
    let stack = Stack::embedded();
    let file = stack.folder.path().join("password");
    fs::write(&file, CANARY).expect("a file");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).expect("its mode");
    // No broker listens on port 1, so the service waits and reports the reason.
    let url =
        |password: &str| format!("kafka://127.0.0.1:1/o?sasl=plain&user=ann&password={password}");
    let database = format!("sqlite://{}", stack.folder.path().join("d.db").display());
    for (password, is_in_command_line) in
        [(format!("@{}", file.display()), false), ("$CANARY".into(), false), (CANARY.into(), true)]
    {
        let url = url(&password);
        let variables = [("CANARY", CANARY), ("RUST_LOG", "debug")];
        let service = stack.start_with(&["--log", &url, "--database", &database], &variables);
        for path in ["/health/ready", "/health/live", "/metrics", "/nodes", "/"] {
            let reply = service.get(path);
            assert!(!format!("{reply:?}").contains(CANARY), "{path}: {reply:?}");
        }
        support::wait_for("the log is waited for", || {
            service.log().contains("is not there yet").then_some(())
        });
        assert!(!service.log().contains(CANARY), "{}", service.log());
        let stdout = fs::read_to_string(stack.folder.path().join("stdout")).expect("text");
        assert!(!stdout.contains(CANARY), "{stdout}");
        let command_line = fs::read(format!("/proc/{}/cmdline", service.pid())).expect("a process");
        let command_line = String::from_utf8_lossy(&command_line);
        assert_eq!(command_line.contains(CANARY), is_in_command_line, "{command_line}");
    }
}

#[test]
fn a_password_in_the_wrong_place_is_not_repeated() {
    let stack = Stack::embedded();
    let folder = stack.folder.path();
    let url = format!("kafka://ann:{CANARY}@127.0.0.1:1/o?librdkafka.sasl.passwort={CANARY}");
    for arguments in [
        &["serve", "--log", &url, "--database", "sqlite://d.db", "--listen", "127.0.0.1:0"][..],
        &["serve", "--logg", &url],
        &["serve", "--listen", &url],
        &["serve", "--database", &url],
        &[&url],
    ] {
        let output = run(folder, arguments);
        assert!(!output.status.success(), "{arguments:?}");
        let said = format!(
            "{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        assert!(!said.contains(CANARY), "{arguments:?}: {said}");
    }
    let help = orders(folder, &["serve", "--help"])
        .env("KAFOLD_LOG", &url)
        .env("KAFOLD_DATABASE", format!("postgres://ann:{CANARY}@h/d"))
        .output()
        .expect("the program starts");
    assert!(!String::from_utf8_lossy(&help.stdout).contains(CANARY), "{help:?}");
}
