//! Passwords: where they come from, and that they are never shown.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use secrecy::{ExposeSecret, SecretString};

use crate::error::ConfigError;

/// Longest secret, in bytes.
pub const SECRET_BYTES_MAX: usize = 4_096;
/// What is shown in the place of a secret.
pub(crate) const HIDDEN: &str = "●●●";
/// The name by which `allow_unsafe` accepts a secret file that others can read.
pub(crate) const READABLE: &str = "readable_secret";

/// A secret and where it comes from. `Debug` shows the place of one that stands elsewhere, and never the
/// secret.
#[derive(Clone)]
pub struct Secret {
    source: Source,
    /// As it was read last: a file that is being replaced may be absent for a moment.
    newest: Arc<Mutex<SecretString>>,
}

#[derive(Clone)]
enum Source {
    /// The URL itself.
    Literal,
    /// A file whose contents are the secret, but for one newline at the end.
    File { path: PathBuf, may_be_readable: bool },
    /// A variable of the environment.
    Variable(String),
}

impl Secret {
    /// Reads the secret that `text` is or names: `@FILE`, `$VARIABLE`, or itself, percent-encoded.
    ///
    /// A relative `FILE` is looked up in systemd's `$CREDENTIALS_DIRECTORY`, if there is one. A file
    /// that others can read is refused unless `may_be_readable`.
    pub(crate) fn parse(
        option: &str,
        text: &str,
        may_be_readable: bool,
    ) -> Result<Self, ConfigError> {
        let (source, literal) = match text.split_at_checked(1) {
            Some(("@", file)) => (Source::File { path: credential(file), may_be_readable }, ""),
            Some(("$", name)) => (Source::Variable(name.to_owned()), ""),
            _ => (Source::Literal, text),
        };
        let literal = percent_encoding::percent_decode_str(literal).decode_utf8();
        let refused = |problem: String| ConfigError::Secret { option: option.to_owned(), problem };
        let literal = literal.map_err(|_| refused("is not UTF-8 when percent-decoded".into()))?;
        let secret = Self { source, newest: Arc::new(Mutex::new(literal.into_owned().into())) };
        let read = secret.read_again().map_err(refused)?;
        secret.keep(read);
        Ok(secret)
    }

    /// The secret as it is now; as it was last, with a warning, if it cannot be read now.
    pub(crate) fn read(&self) -> SecretString {
        match self.read_again() {
            Ok(secret) => self.keep(secret),
            Err(problem) => {
                tracing::warn!("a secret {problem}; the one that was read last is used")
            }
        }
        self.newest.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn keep(&self, secret: SecretString) {
        *self.newest.lock().unwrap_or_else(PoisonError::into_inner) = secret;
    }

    /// Whether it stands in the URL, where the list of processes shows it.
    pub(crate) fn is_literal(&self) -> bool {
        matches!(self.source, Source::Literal)
    }

    fn read_again(&self) -> Result<SecretString, String> {
        let secret = match &self.source {
            Source::Literal => self.newest.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            Source::File { path, may_be_readable } => read_file(path, *may_be_readable)?,
            // The name is not repeated: it may be a secret that begins with `$`.
            Source::Variable(name) => std::env::var(name)
                .map_err(|_| {
                    "is to come from a variable of the environment that is not set, or not UTF-8 \
                     (a secret that begins with $ is written %24…)"
                        .to_owned()
                })?
                .into(),
        };
        match secret.expose_secret() {
            "" => Err("is empty".into()),
            text if text.contains('\0') => Err("has a byte of 0".into()),
            text if text.len() > SECRET_BYTES_MAX => {
                Err(format!("is longer than {SECRET_BYTES_MAX} bytes"))
            }
            _ => Ok(secret),
        }
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.source {
            Source::Literal => f.write_str(HIDDEN),
            Source::File { path, .. } => write!(f, "@{}", shown(path)),
            Source::Variable(_) => write!(f, "${HIDDEN}"),
        }
    }
}

/// Whether the value of a setting of this name is a secret.
pub(crate) fn is_secret(key: &str) -> bool {
    const WORDS: &[&str] =
        &["password", "secret", "token", "key.pem", "jaas", "oauthbearer.config"];
    let key = key.to_ascii_lowercase();
    WORDS.iter().any(|word| key.contains(word))
}

/// Refuses a file with a secret that others can read, by PostgreSQL's rule for private keys: only the
/// owner may, and the group too if the owner is root.
pub(crate) fn check_mode(path: &Path) -> Result<(), String> {
    let found = path.metadata().map_err(|error| unreadable(path, &error))?;
    let allowed = if found.uid() == 0 { 0o740 } else { 0o700 };
    let mode = found.mode() & 0o777;
    if mode & !allowed == 0 {
        return Ok(());
    }
    Err(format!(
        "is in {}, which others can read (mode {mode:04o}): run chmod 600 on it, or accept it with \
         ?allow_unsafe={READABLE}",
        shown(path)
    ))
}

fn read_file(path: &Path, may_be_readable: bool) -> Result<SecretString, String> {
    if !may_be_readable {
        check_mode(path)?;
    }
    let mut bytes = Vec::new();
    let read = File::open(path)
        .and_then(|file| file.take(SECRET_BYTES_MAX as u64 + 2).read_to_end(&mut bytes));
    read.map_err(|error| unreadable(path, &error))?;
    let mut text =
        String::from_utf8(bytes).map_err(|_| format!("in {} is not UTF-8", shown(path)))?;
    if text.ends_with('\n') {
        text.pop();
        if text.ends_with('\r') {
            text.pop();
        }
    }
    Ok(text.into())
}

fn unreadable(path: &Path, error: &io::Error) -> String {
    format!("cannot be read from {} ({error}): name a file that this user can read", shown(path))
}

/// A relative name is one of systemd's credentials, where there are any.
fn credential(file: &str) -> PathBuf {
    match std::env::var_os("CREDENTIALS_DIRECTORY") {
        Some(folder) => Path::new(&folder).join(file),
        None => file.into(),
    }
}

/// A path; a bare name may be a secret that begins with `@`.
fn shown(path: &Path) -> String {
    match path.parent() {
        Some(folder) if folder != Path::new("") && path.is_absolute() => path.display().to_string(),
        _ => "a file of the working directory".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn file(name: &str, contents: &[u8], mode: u32) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("kafold-secret-{}", std::process::id()));
        fs::create_dir_all(&folder).expect("a folder");
        let path = folder.join(name);
        fs::write(&path, contents).expect("a file");
        fs::set_permissions(&path, Permissions::from_mode(mode)).expect("its mode");
        path
    }

    fn of(text: &str) -> Result<String, ConfigError> {
        Secret::parse("password", text, false).map(|s| s.read().expose_secret().to_owned())
    }

    #[test]
    fn a_secret_comes_from_the_url_a_file_or_the_environment() {
        assert_eq!(of("a%26b").ok().as_deref(), Some("a&b"));
        assert_eq!(of("%40a").ok().as_deref(), Some("@a"));
        for (contents, secret) in [("a b\n", "a b"), ("a\r\n", "a"), ("a\n\n", "a\n"), ("a", "a")] {
            let path = file("plain", contents.as_bytes(), 0o600);
            assert_eq!(of(&format!("@{}", path.display())).ok().as_deref(), Some(secret));
        }
        let home = std::env::var("PATH").expect("every process has one");
        assert_eq!(of("$PATH").ok(), Some(home));
        for wrong in ["", "$", "$KAFOLD_NOT_SET", "@/does/not/exist", "%00", "%ff"] {
            assert!(of(wrong).is_err(), "{wrong}");
        }
        let binary = file("binary", b"\xff", 0o600);
        let long = file("long", &[b'a'; SECRET_BYTES_MAX + 1], 0o600);
        for path in [binary, long] {
            assert!(of(&format!("@{}", path.display())).is_err(), "{path:?}");
        }
    }

    #[test]
    fn a_secret_file_that_others_can_read_is_refused_by_name() {
        let path = file("open", b"hunter2\n", 0o644);
        let text = format!("@{}", path.display());
        let refused = of(&text).expect_err("others can read it").to_string();
        assert!(refused.contains("readable_secret") && refused.contains("0644"), "{refused}");
        assert!(!refused.contains("hunter2"), "{refused}");
        let accepted = Secret::parse("password", &text, true).expect("accepted");
        assert_eq!(accepted.read().expose_secret(), "hunter2");
    }

    #[test]
    fn a_changed_file_is_read_again_and_an_absent_one_is_as_it_was() {
        let path = file("changing", b"old", 0o600);
        let secret = Secret::parse("password", &format!("@{}", path.display()), false);
        let secret = secret.expect("readable");
        fs::write(&path, "new").expect("a file");
        assert_eq!(secret.read().expose_secret(), "new");
        fs::remove_file(&path).expect("it is there");
        assert_eq!(secret.read().expose_secret(), "new");
    }

    #[test]
    fn debug_shows_no_secret() {
        let literal = Secret::parse("password", "hunter2", false).expect("valid");
        assert_eq!(format!("{literal:?}"), HIDDEN);
    }
}
