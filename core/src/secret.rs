//! Secrets named in a connection's URL.
//!
//! A URL gives a secret as `@FILE`, as `$NAME` of an environment variable, or literally. A
//! [`SecretSource`] is this reference; a reference to a file or a variable may be shown.
//! [`SecretSource::read`] returns the current [`Secret`]: a connector which reads the secret for
//! each new connection follows a rotation without a restart.

use std::fmt;
use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// Most bytes of one secret: far above any password, token or PEM key.
pub const SECRET_BYTES_MAX: u64 = 64 * 1024;

/// The environment variable in which systemd names the folder of a unit's credentials.
pub const CREDENTIALS_DIRECTORY: &str = "CREDENTIALS_DIRECTORY";

/// A password, token or key. `Debug` shows `●●●`, and there is no `Display`.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Wraps a secret that is already in memory.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// Returns the secret in clear text, only for the driver which sends or hashes the secret.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("●●●")
    }
}

/// A secret's source in a URL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SecretSource {
    /// A literal secret, visible in the process list and the shell's history.
    Literal(Secret),
    /// `@FILE`: a file, read again each time.
    File(PathBuf),
    /// `$NAME`: an environment variable.
    Environment(String),
}

/// The reason for an unreadable secret, with the remedy. Names files and variables, never a secret.
#[derive(Debug, thiserror::Error)]
#[error("{what}; {remedy}")]
pub struct SecretError {
    what: String,
    remedy: String,
}

impl SecretSource {
    /// Parses a percent-decoded parameter of a URL: `@FILE`, `$NAME`, or a literal secret.
    ///
    /// Rejects an empty value, `@` without a file, and `$` without a variable's name. The error
    /// does not contain the value, because a password may begin with `$`.
    pub fn parse(value: &str) -> Result<Self, SecretError> {
        if let Some(name) = value.strip_prefix('$') {
            let first = name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_');
            if !first || name.contains(|c: char| !c.is_ascii_alphanumeric() && c != '_') {
                return Err(SecretError::new(
                    "the secret begins with '$', and no variable's name follows",
                    "give $NAME of an environment variable, or @FILE",
                ));
            }
            return Ok(Self::Environment(name.to_owned()));
        }
        match value.strip_prefix('@') {
            Some("") => Err(SecretError::new("'@' names no secret file", "give @FILE")),
            Some(file) => Ok(Self::File(file.into())),
            None if value.is_empty() => {
                Err(SecretError::new("the secret is empty", "give @FILE or $NAME"))
            }
            None => Ok(Self::Literal(Secret::new(value))),
        }
    }

    /// Returns the current secret, without one newline at the end.
    ///
    /// A relative file is looked up in systemd's `$CREDENTIALS_DIRECTORY` first, then in the
    /// working directory. Rejects a secret which is missing, empty, longer than
    /// [`SECRET_BYTES_MAX`], or no UTF-8. Unless `readable_allowed`, also rejects a file with read
    /// or write access for users other than the owner and the group.
    pub fn read(&self, readable_allowed: bool) -> Result<Secret, SecretError> {
        match self {
            Self::Literal(secret) => Ok(secret.clone()),
            Self::Environment(name) => match std::env::var(name) {
                Ok(value) if !value.is_empty() => Ok(Secret::new(value)),
                Ok(_) => Err(SecretError::new(
                    format!("the environment variable {name} is empty"),
                    "set it to the secret",
                )),
                Err(std::env::VarError::NotPresent) => Err(SecretError::new(
                    format!("the environment variable {name} is not set"),
                    "set it to the secret, or give @FILE",
                )),
                Err(std::env::VarError::NotUnicode(_)) => Err(SecretError::new(
                    format!("the environment variable {name} is not UTF-8"),
                    "set it to the secret",
                )),
            },
            Self::File(file) => read_file(&located(file), readable_allowed),
        }
    }

    /// Returns `true` for a file with read or write access for users other than the owner and the
    /// group.
    pub fn is_exposed_file(&self) -> bool {
        match self {
            Self::File(file) => fs::metadata(located(file)).is_ok_and(|data| is_exposed(&data)),
            Self::Literal(_) | Self::Environment(_) => false,
        }
    }
}

impl SecretError {
    fn new(what: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { what: what.into(), remedy: remedy.into() }
    }
}

/// Returns the path of a file name: systemd's credential of the same name, if present.
fn located(file: &Path) -> PathBuf {
    let credentials = std::env::var_os(CREDENTIALS_DIRECTORY);
    in_credentials(file, credentials.as_deref().map(Path::new))
}

fn in_credentials(file: &Path, credentials: Option<&Path>) -> PathBuf {
    let credential = credentials.map(|folder| folder.join(file));
    credential.filter(|credential| credential.exists()).unwrap_or_else(|| file.to_owned())
}

/// Returns a path for messages. A path with the rest of a mistyped URL may hold a secret and is not
/// shown.
pub fn shown_path(path: &Path) -> String {
    let shown = path.display().to_string();
    match shown.contains(['=', '&', ';', '?']) {
        false => shown,
        true => "(a path that is not shown, it may hold a secret)".to_owned(),
    }
}

fn read_file(file: &Path, readable_allowed: bool) -> Result<Secret, SecretError> {
    let shown = shown_path(file);
    let failed = |error: io::Error| {
        SecretError::new(
            format!("the secret file {shown} cannot be read: {error}"),
            "create it, readable for the user of this process only",
        )
    };
    // Opening a named pipe would wait for a writer.
    let is_file = |data: &Metadata| {
        let refused = || SecretError::new(format!("{shown} is not a file"), "name a secret file");
        if data.is_file() { Ok(()) } else { Err(refused()) }
    };
    is_file(&fs::metadata(file).map_err(failed)?)?;
    let opened = File::open(file).map_err(failed)?;
    // Reads the mode of the opened file, since another file may have taken its name.
    let data = opened.metadata().map_err(failed)?;
    is_file(&data)?;
    if is_exposed(&data) && !readable_allowed {
        return Err(SecretError::new(
            format!("other users can read or write the secret file {shown}"),
            format!("run chmod o-rwx {shown}, or say allow_unsafe=readable_secret"),
        ));
    }
    let mut bytes = Vec::new();
    opened.take(SECRET_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > SECRET_BYTES_MAX {
        return Err(SecretError::new(
            format!("the secret file {shown} is longer than {SECRET_BYTES_MAX} bytes"),
            "name the file of the secret",
        ));
    }
    let text = String::from_utf8(bytes).map_err(|_| {
        SecretError::new(
            format!("the secret file {shown} is not UTF-8"),
            "name the file of the secret",
        )
    })?;
    let line =
        text.strip_suffix('\n').map_or(&*text, |line| line.strip_suffix('\r').unwrap_or(line));
    match line {
        "" => Err(SecretError::new(
            format!("the secret file {shown} is empty"),
            "write the secret into it",
        )),
        line => Ok(Secret::new(line)),
    }
}

#[cfg(unix)]
fn is_exposed(data: &Metadata) -> bool {
    use std::os::unix::fs::PermissionsExt;
    data.permissions().mode() & 0o007 != 0
}

#[cfg(not(unix))]
fn is_exposed(_: &Metadata) -> bool {
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Creates a new file for one test, in the folder for temporary files.
    fn file(name: &str, content: &[u8]) -> PathBuf {
        let file = std::env::temp_dir().join(format!("kafold-{}-{name}", std::process::id()));
        fs::write(&file, content).expect("writes");
        set_mode(&file, 0o600);
        file
    }

    #[cfg(unix)]
    fn set_mode(file: &Path, mode: u32) {
        use std::os::unix::fs::PermissionsExt;
        fs::set_permissions(file, fs::Permissions::from_mode(mode)).expect("changes the mode");
    }

    #[cfg(not(unix))]
    fn set_mode(_: &Path, _: u32) {}

    fn read(file: &Path) -> Result<Secret, SecretError> {
        SecretSource::File(file.to_owned()).read(false)
    }

    #[test]
    fn a_value_is_a_file_a_variable_or_the_secret_itself() {
        let parse = |value: &str| SecretSource::parse(value).expect("a source");
        assert_eq!(parse("@/run/s"), SecretSource::File("/run/s".into()));
        assert_eq!(parse("$DB_PASSWORD"), SecretSource::Environment("DB_PASSWORD".into()));
        assert_eq!(parse("pa$s@word"), SecretSource::Literal(Secret::new("pa$s@word")));
        for bad in ["", "@", "$", "$canary!", "$1canary"] {
            let refused = SecretSource::parse(bad).expect_err(bad).to_string();
            assert!(!refused.contains("canary"), "{refused}");
        }
    }

    #[test]
    fn neither_debug_nor_errors_show_a_secret() {
        let literal = SecretSource::parse("canary").expect("a source");
        assert_eq!(format!("{literal:?}"), "Literal(●●●)");
        let bad = file("not-utf8", b"canary\xff");
        assert!(!read(&bad).expect_err("not UTF-8").to_string().contains("canary"));
        fs::remove_file(bad).expect("removes");
    }

    #[test]
    fn a_file_is_read_anew_each_time_and_loses_one_newline() {
        let path = file("rotated", b"first\n");
        let source = SecretSource::File(path.clone());
        let text = || source.read(false).expect("reads").expose().to_owned();
        assert_eq!(text(), "first");
        for (content, expected) in [("second\r\n", "second"), ("a \n\n", "a \n"), ("b", "b")] {
            fs::write(&path, content).expect("writes");
            assert_eq!(text(), expected);
        }
        fs::remove_file(path).expect("removes");
    }

    #[test]
    #[cfg(unix)]
    fn a_file_that_others_can_read_is_refused_unless_allowed() {
        let path = file("exposed", b"secret\n");
        let source = SecretSource::File(path.clone());
        set_mode(&path, 0o640);
        assert!(source.read(false).is_ok() && !source.is_exposed_file());
        set_mode(&path, 0o644);
        let refused = source.read(false).expect_err("exposed").to_string();
        assert!(
            refused.contains("chmod o-rwx") && refused.contains("readable_secret"),
            "{refused}"
        );
        assert!(source.is_exposed_file());
        assert_eq!(source.read(true).expect("allowed").expose(), "secret");
        fs::remove_file(path).expect("removes");
    }

    #[test]
    fn a_missing_empty_or_endless_secret_is_refused_by_its_place() {
        let refused = |source: &SecretSource| source.read(false).expect_err("refused").to_string();
        let unset = SecretSource::Environment("KAFOLD_NO_SUCH_SECRET".into());
        assert!(refused(&unset).contains("KAFOLD_NO_SUCH_SECRET is not set"));
        let missing = SecretSource::File("/no/such/secret".into());
        assert!(refused(&missing).contains("/no/such/secret cannot be read"));
        assert!(refused(&SecretSource::File(std::env::temp_dir())).contains("is not a file"));
        let path = file("sizes", b"\n");
        assert!(read(&path).expect_err("empty").to_string().contains("is empty"));
        fs::write(&path, vec![b'x'; 65_537]).expect("writes");
        assert!(read(&path).expect_err("long").to_string().contains("longer than 65536 bytes"));
        fs::remove_file(path).expect("removes");
    }

    #[test]
    fn a_relative_name_is_a_credential_of_systemd_where_there_is_one() {
        let path = file("credential", b"secret");
        let folder = path.parent().expect("a folder");
        let name = Path::new(path.file_name().expect("a name"));
        assert_eq!(in_credentials(name, Some(folder)), path);
        assert_eq!(in_credentials(Path::new("other"), Some(folder)), Path::new("other"));
        assert_eq!(in_credentials(name, None), name);
        assert_eq!(in_credentials(Path::new("/a"), Some(folder)), Path::new("/a"));
        fs::remove_file(path).expect("removes");
    }
}
