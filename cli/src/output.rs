//! Standard output: lines, aligned tables, or one JSON document. All output passes [`printable`].

use std::borrow::Cow;
use std::fmt::Write as _;
use std::io::{self, BufWriter, Stderr, Stdout, Write};

use serde::Serialize;
use unicode_width::UnicodeWidthStr;

use crate::error::Error;

/// Where a command prints.
pub(crate) struct Output {
    /// Whether the reader wants JSON.
    pub(crate) json: bool,
    writer: BufWriter<Stdout>,
}

impl Output {
    pub(crate) fn new(json: bool) -> Self {
        Self { json, writer: BufWriter::new(io::stdout()) }
    }

    /// One line of text, or several.
    pub(crate) fn line(&mut self, text: &str) -> Result<(), Error> {
        Ok(writeln!(self.writer, "{}", printable(text))?)
    }

    /// Writes text of the program itself unchanged.
    pub(crate) fn raw(&mut self, text: &[u8]) -> Result<(), Error> {
        Ok(self.writer.write_all(text)?)
    }

    /// The one JSON document of a command.
    pub(crate) fn document(&mut self, document: &impl Serialize) -> Result<(), Error> {
        self.line(&json(serde_json::to_string_pretty(document))?)
    }

    /// One of many JSON documents, a line each.
    pub(crate) fn json_line(&mut self, document: &impl Serialize) -> Result<(), Error> {
        self.line(&json(serde_json::to_string(document))?)
    }

    /// Prints rows below a header, in columns as wide as the widest cell. Only the first line of a
    /// cell is printed.
    pub(crate) fn table<const N: usize>(
        &mut self,
        header: [&str; N],
        rows: &[[String; N]],
    ) -> Result<(), Error> {
        let first = |row: &[String; N]| row.each_ref().map(|cell| first_line(cell));
        let all: Vec<[String; N]> =
            std::iter::once(header.map(str::to_owned)).chain(rows.iter().map(first)).collect();
        let widths: [usize; N] =
            std::array::from_fn(|n| all.iter().map(|row| row[n].width()).max().unwrap_or(0));
        for row in &all {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(widths) {
                line += cell;
                line.extend(std::iter::repeat_n(' ', width - cell.width() + 2));
            }
            self.line(line.trim_end())?;
        }
        Ok(())
    }

    /// Hands over what is printed so far.
    pub(crate) fn flush(&mut self) -> Result<(), Error> {
        Ok(self.writer.flush()?)
    }
}

fn json(text: serde_json::Result<String>) -> Result<String, Error> {
    text.map_err(|error| Error::failed(format!("cannot be written as JSON: {error}")))
}

/// `1 partition`, `3 partitions`.
pub(crate) fn count(number: u64, what: &str) -> String {
    let plural = if number == 1 { "" } else { "s" };
    format!("{} {what}{plural}", thousands(number))
}

/// `1 234 567`: offsets get long.
pub(crate) fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let groups = digits.as_bytes().rchunks(3).rev();
    let groups: Vec<_> = groups.map(String::from_utf8_lossy).collect();
    groups.join(" ")
}

fn first_line(text: &str) -> String {
    match text.split_once('\n') {
        Some((first, _)) => format!("{} …", printable(first)),
        None => printable(text).into_owned(),
    }
}

/// Escapes characters which act on a terminal. Control characters (C0 except the newline, DEL, C1),
/// characters which change the direction of text, and the Unicode line separators are written as
/// `\u001b`.
///
/// Within the strings of a JSON document this form is an escape of JSON itself, so a document keeps
/// its meaning.
pub fn printable(text: &str) -> Cow<'_, str> {
    if !text.contains(acts) {
        return Cow::Borrowed(text);
    }
    let mut shown = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if acts(c) {
            write!(shown, "\\u{:04x}", u32::from(c)).expect("a string takes it");
        } else {
            shown.push(c);
        }
    }
    Cow::Owned(shown)
}

/// Escapes like [`printable`], and newlines too.
pub(crate) fn printable_line(text: &str) -> String {
    printable(text).replace('\n', "\\u000a")
}

fn acts(c: char) -> bool {
    let is_bidi = matches!(
        c,
        '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}'
    );
    is_bidi || (c.is_control() && c != '\n')
}

/// Standard error for a log. All output passes [`printable`], so a log without colours is safe to
/// show.
#[derive(Debug)]
pub struct PrintableStderr(Stderr);

impl PrintableStderr {
    /// Creates a writer to standard error.
    pub fn new() -> Self {
        Self(io::stderr())
    }
}

impl Default for PrintableStderr {
    fn default() -> Self {
        Self::new()
    }
}

impl Write for PrintableStderr {
    /// Writes a whole text, such as a line of a log. Replaces bytes other than UTF-8.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write_all(printable(&String::from_utf8_lossy(bytes)).as_bytes())?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

/// The text, or a dash for nothing.
pub(crate) fn or_dash(text: Option<String>) -> String {
    text.unwrap_or_else(|| "-".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cell_shows_one_line() {
        assert_eq!(first_line("panicked: left != right\n left: 1"), "panicked: left != right …");
        assert_eq!(first_line("3 events"), "3 events");
    }

    #[test]
    fn what_acts_on_a_terminal_is_escaped_and_a_document_keeps_its_meaning() {
        let text = "a\u{1b}[2J\r\t\u{7f}\u{9b}1m\u{202e}\u{2066}\u{85}\u{2028} Ö 界\n";
        let shown = "a\\u001b[2J\\u000d\\u0009\\u007f\\u009b1m\\u202e\\u2066\\u0085\\u2028 Ö 界\n";
        assert_eq!(printable(text), shown);
        assert_eq!(printable(shown), shown, "shown again, it is the same");
        let document = serde_json::to_string(text).expect("a text");
        let read: String = serde_json::from_str(&printable(&document)).expect("JSON");
        assert_eq!(read, text);
        assert_eq!(printable_line("a\nb"), "a\\u000ab");
    }

    #[test]
    fn long_numbers_are_grouped() {
        for (number, text) in [(0, "0"), (999, "999"), (1_000, "1 000"), (1_234_567, "1 234 567")] {
            assert_eq!(thousands(number), text);
        }
    }
}
