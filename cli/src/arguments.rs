//! The command line, with errors which never contain a possible secret.

use std::io::Write;

use clap::Parser;
use clap::error::{ContextKind, ContextValue};

use crate::output::printable;

/// The placeholder for a hidden value.
const HIDDEN: &str = "…";

/// Parses the command line like [`Parser::parse`]. An error names the option without the value: a
/// misplaced URL with a password would end up in logs. Control characters of an argument are escaped.
pub fn parse<C: Parser>() -> C {
    C::try_parse().unwrap_or_else(|error| {
        let error = without_values(error);
        if !error.use_stderr() {
            error.exit();
        }
        let text = error.render().to_string();
        // Standard error may be closed.
        drop(std::io::stderr().write_all(printable(&text).as_bytes()));
        std::process::exit(error.exit_code())
    })
}

fn without_values(mut error: clap::Error) -> clap::Error {
    let mut is_hidden = false;
    for kind in [
        ContextKind::InvalidArg,
        ContextKind::InvalidValue,
        ContextKind::InvalidSubcommand,
        ContextKind::PriorArg,
        ContextKind::TrailingArg,
    ] {
        let shown = match error.get(kind) {
            Some(ContextValue::String(text)) if !is_harmless(text) => {
                ContextValue::String(HIDDEN.to_owned())
            }
            Some(ContextValue::Strings(texts)) if !texts.iter().all(|text| is_harmless(text)) => {
                ContextValue::Strings(vec![HIDDEN.to_owned()])
            }
            _ => continue,
        };
        error.insert(kind, shown);
        is_hidden = true;
    }
    if is_hidden {
        // A suggestion would repeat the value: "to pass '…' as a value, use …".
        error.remove(ContextKind::Suggested);
    }
    error
}

/// Returns `true` for the name of an option or a command, such as `--log <URL>`, `<FILE>` or
/// `stauts`.
fn is_harmless(text: &str) -> bool {
    const BYTES_MAX: usize = 24;
    let is_name = |word: &str| {
        let is_letter = |b: u8| b.is_ascii_lowercase() || b == b'-';
        !word.is_empty() && word.len() <= BYTES_MAX && word.bytes().all(is_letter)
    };
    let is_placeholder = |word: &str| {
        let inner = word.trim_end_matches("...");
        let inner = inner
            .strip_prefix('<')
            .and_then(|rest| rest.strip_suffix('>'))
            .or_else(|| inner.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')));
        inner.is_some_and(|inner| {
            inner.len() <= BYTES_MAX && inner.bytes().all(|b| b.is_ascii_uppercase() || b == b'_')
        })
    };
    text.split(' ').all(|word| is_name(word) || is_placeholder(word))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Cli {
        #[arg(long)]
        partition: Option<u32>,
        #[arg(long)]
        log: Option<String>,
    }

    fn error(arguments: &[&str]) -> String {
        let all = std::iter::once("test").chain(arguments.iter().copied());
        without_values(Cli::try_parse_from(all).expect_err("wrong")).to_string()
    }

    #[test]
    fn an_error_names_the_option_and_not_the_value() {
        let secret = "kafka://u:hunter2@h:1/o";
        for arguments in [
            [secret, ""].as_slice(),
            &["--log", "a", secret],
            &["--logg", secret],
            &["--partition", secret],
            &["--hunter2"],
            &["--log=a", "--log", secret],
            &["-hunter2"],
        ] {
            let text = error(arguments);
            assert!(!text.contains("hunter2"), "{arguments:?}: {text}");
        }
        assert!(error(&["--partition", "hunter2"]).contains("--partition <PARTITION>"));
        assert!(error(&["--lgo", "a"]).contains("'--lgo'"));
    }
}
