//! Standard output: lines, aligned tables, or one JSON document.

use std::io::{BufWriter, Stdout, Write};

use serde::Serialize;

use crate::error::Error;

/// Where a command prints.
pub(crate) struct Output {
    /// Whether the reader wants JSON.
    pub(crate) json: bool,
    writer: BufWriter<Stdout>,
}

impl Output {
    pub(crate) fn new(json: bool) -> Self {
        Self { json, writer: BufWriter::new(std::io::stdout()) }
    }

    /// One line of text, or several.
    pub(crate) fn line(&mut self, text: &str) -> Result<(), Error> {
        Ok(writeln!(self.writer, "{text}")?)
    }

    /// Text as it is.
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

    /// Rows below a header, in columns as wide as their longest cell; of a cell with several lines
    /// the first.
    pub(crate) fn table<const N: usize>(
        &mut self,
        header: [&str; N],
        rows: &[[String; N]],
    ) -> Result<(), Error> {
        let first = |row: &[String; N]| row.each_ref().map(|cell| first_line(cell));
        let all: Vec<[String; N]> =
            std::iter::once(header.map(str::to_owned)).chain(rows.iter().map(first)).collect();
        let chars = |cell: &String| cell.chars().count();
        let widths: [usize; N] =
            std::array::from_fn(|n| all.iter().map(|row| chars(&row[n])).max().unwrap_or(0));
        for row in &all {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(widths) {
                line += cell;
                line.extend(std::iter::repeat_n(' ', width - chars(cell) + 2));
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
        Some((first, _)) => format!("{first} …"),
        None => text.to_owned(),
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
    fn long_numbers_are_grouped() {
        for (number, text) in [(0, "0"), (999, "999"), (1_000, "1 000"), (1_234_567, "1 234 567")] {
            assert_eq!(thousands(number), text);
        }
    }
}
