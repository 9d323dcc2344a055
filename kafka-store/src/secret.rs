//! The password of a log's URL, and the list of librdkafka settings with secrets.

use std::fmt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use kafold_core::Clock;
use kafold_core::clock::SystemClock;
use kafold_core::secret::{SecretSource, shown_path};
use percent_encoding::percent_decode_str;
use secrecy::SecretString;

use crate::error::ConfigError;

/// The placeholder shown instead of a secret.
pub(crate) const HIDDEN: &str = "●●●";
/// Least time between two warnings about an unreadable source.
const WARNING_INTERVAL: Duration = Duration::from_secs(60);
/// The name by which `allow_unsafe` accepts a secret file with read access for others.
pub(crate) const READABLE: &str = "readable_secret";

/// A password and its source. `Debug` may show the path of a file, and never the password.
#[derive(Clone)]
pub struct Password {
    source: SecretSource,
    may_be_readable: bool,
    /// The last password read: a file is absent for a moment while an editor replaces the file.
    newest: Arc<Mutex<SecretString>>,
    /// The time of the last warning about an unreadable source.
    warned: Arc<Mutex<Option<Instant>>>,
}

impl Password {
    /// Parses and reads a percent-encoded password: `@FILE`, `$VARIABLE`, or a literal, as in
    /// [`SecretSource`]. A literal password with a leading `@` or `$` is written `%40…` or `%24…`.
    pub(crate) fn parse(text: &str, may_be_readable: bool) -> Result<Self, ConfigError> {
        let decoded = percent_decode_str(text).decode_utf8();
        let decoded = decoded.map_err(|_| refused("is not UTF-8 when percent-decoded"))?;
        let source = match text.split_at_checked(1) {
            Some(("@" | "$", _)) => SecretSource::parse(&decoded),
            Some(_) => Ok(SecretSource::Literal(kafold_core::secret::Secret::new(&*decoded))),
            None => return Err(refused("is empty: write password=@FILE or password=$VARIABLE")),
        };
        let source = source.map_err(|error| refused(format!("cannot be used: {error}")))?;
        let newest = Arc::new(Mutex::new(SecretString::default()));
        let password = Self { source, may_be_readable, newest, warned: Arc::default() };
        let read = password.read_again().map_err(refused)?;
        password.keep(read);
        Ok(password)
    }

    /// Returns the current password. Returns the last password, with a warning, if the source is
    /// unreadable now.
    pub(crate) fn read(&self) -> SecretString {
        match self.read_again() {
            Ok(read) => self.keep(read),
            Err(problem) if self.may_warn() => {
                tracing::warn!("the log's password {problem}; the last one is used");
            }
            Err(_) => {}
        }
        self.newest.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Returns `true` at most once a minute: every client reads the password every few seconds.
    fn may_warn(&self) -> bool {
        let now = SystemClock.instant();
        let mut warned = self.warned.lock().unwrap_or_else(PoisonError::into_inner);
        let is_due = warned.is_none_or(|warned| now - warned >= WARNING_INTERVAL);
        if is_due {
            *warned = Some(now);
        }
        is_due
    }

    fn keep(&self, read: SecretString) {
        *self.newest.lock().unwrap_or_else(PoisonError::into_inner) = read;
    }

    /// Returns `true` for a literal password in the URL, visible in the list of processes.
    pub(crate) fn is_literal(&self) -> bool {
        matches!(self.source, SecretSource::Literal(_))
    }

    fn read_again(&self) -> Result<SecretString, String> {
        let read = self.source.read(self.may_be_readable);
        let read = read.map_err(|error| match &self.source {
            SecretSource::File(file) if file.is_absolute() => format!("cannot be used: {error}"),
            // A relative name is not repeated, because a password may begin with `@`.
            SecretSource::File(_) => {
                "is to be read from a relative file that is not there or not readable for its owner \
                 alone: name one by its full path (a password that begins with @ is written %40…)"
                    .to_owned()
            }
            _ => "is to come from a variable of the environment that is not set, empty or not UTF-8: \
                  set it (a password that begins with $ is written %24…)"
                .to_owned(),
        })?;
        match read.expose().contains('\0') {
            true => Err("has a byte of 0".to_owned()),
            false => Ok(read.expose().into()),
        }
    }
}

impl fmt::Debug for Password {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.source {
            SecretSource::File(file) if file.is_absolute() => write!(f, "@{}", shown_path(file)),
            SecretSource::Literal(_) | SecretSource::File(_) | SecretSource::Environment(_) => {
                f.write_str(HIDDEN)
            }
        }
    }
}

fn refused(problem: impl Into<String>) -> ConfigError {
    ConfigError::Secret { option: "password".into(), problem: problem.into() }
}

/// Returns `true` if the setting's value is a secret.
pub(crate) fn is_secret(key: &str) -> bool {
    const WORDS: &[&str] =
        &["password", "secret", "token", "key.pem", "jaas", "oauthbearer.config"];
    let key = key.to_ascii_lowercase();
    WORDS.iter().any(|word| key.contains(word))
}

/// Rejects a private key's file with read access for others.
pub(crate) fn check_mode(path: &Path) -> Result<(), String> {
    match SecretSource::File(path.to_owned()).is_exposed_file() {
        false => Ok(()),
        true => Err(format!(
            "names {}, which others can read: run chmod o-rwx on it, or accept it with \
             ?allow_unsafe={READABLE}",
            shown_path(path)
        )),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use secrecy::ExposeSecret;

    use super::*;

    fn of(text: &str) -> Result<String, ConfigError> {
        Password::parse(text, false).map(|password| password.read().expose_secret().to_owned())
    }

    #[test]
    fn a_password_is_in_the_url_a_file_or_the_environment() {
        assert_eq!(of("a%26b").ok().as_deref(), Some("a&b"));
        assert_eq!(of("%40a").ok().as_deref(), Some("@a"));
        assert_eq!(of("%24a").ok().as_deref(), Some("$a"));
        assert_eq!(of("$PATH").ok(), std::env::var("PATH").ok());
        for wrong in ["", "$", "$KAFOLD_NOT_SET", "@/does/not/exist", "@not-there", "%00", "%ff"] {
            let error = of(wrong).expect_err(wrong).to_string();
            assert!(error.contains("password") && !error.contains("not-there"), "{error}");
        }
    }

    #[test]
    fn a_changed_file_is_read_again_and_an_absent_one_is_as_it_was() {
        let path = std::env::temp_dir().join(format!("kafold-password-{}", std::process::id()));
        fs::write(&path, "old").expect("a file");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).expect("its mode");
        let url = format!("@{}", path.display());
        let error = Password::parse(&url, false).expect_err("others can read it").to_string();
        assert!(error.contains("readable_secret"), "{error}");
        let password = Password::parse(&url, true).expect("accepted");
        fs::write(&path, "new").expect("a file");
        assert_eq!(password.read().expose_secret(), "new");
        fs::remove_file(&path).expect("it is there");
        assert_eq!(password.read().expose_secret(), "new");
        assert_eq!(format!("{password:?}"), url);
        let literal = Password::parse("hunter2", false).expect("valid");
        assert_eq!(format!("{literal:?}"), HIDDEN);
    }
}
