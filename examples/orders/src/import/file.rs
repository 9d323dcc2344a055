//! The file of purchases: customer, date, number of CDs, dollars; one purchase a line.

use std::fmt;
use std::path::Path;
use std::str::SplitWhitespace;

use chrono::{DateTime, NaiveDate, NaiveTime, Utc};
use kafold::CommandId;
use uuid::{Uuid, uuid};

use crate::order::{AMOUNT_CENTS_MAX, QUANTITY_MAX, check_customer};

/// Largest file that is read: the whole is checked before anything is sent.
const FILE_BYTES_MAX: u64 = 256 * 1024 * 1024;
/// Most mistakes that are told of one file.
const MISTAKES_MAX: usize = 20;
/// The article of every purchase.
pub(crate) const SKU: &str = "cd";
/// Command ids are derived in this namespace; another one would import everything a second time.
const NAMESPACE: Uuid = uuid!("8b1f5c0e-64a2-5d0b-9f0e-2d1c7a6f4e35");

/// One purchase.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Purchase {
    /// Its line in the file, counted from 1, the header included.
    pub(crate) line: usize,
    pub(crate) customer: String,
    pub(crate) date: NaiveDate,
    pub(crate) quantity: i64,
    pub(crate) amount_cents: i64,
}

impl Purchase {
    /// `cdnow-LINE`.
    pub(crate) fn order_id(&self) -> String {
        format!("cdnow-{}", self.line)
    }

    /// The beginning of its day.
    pub(crate) fn placed_at(&self) -> DateTime<Utc> {
        self.date.and_time(NaiveTime::MIN).and_utc()
    }

    /// The id of one of its commands: the same for the same line with the same purchase, so that a
    /// second import changes nothing, and a changed line is not taken for the old one.
    pub(crate) fn command_id(&self, verb: &str) -> CommandId {
        let Self { line, customer, date, quantity, amount_cents } = self;
        let name = format!("{verb} {line} {customer} {date} {quantity} {amount_cents}");
        CommandId::derived(NAMESPACE, name.as_bytes())
    }
}

/// Why a file is not imported.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FileError {
    #[error("cannot read {path}: {error}")]
    Unreadable { path: String, error: std::io::Error },
    #[error("{path} has {bytes} bytes, at most {FILE_BYTES_MAX} are read: split it")]
    TooLarge { path: String, bytes: u64 },
    #[error("{path} has no purchase")]
    Empty { path: String },
    #[error("{path} has mistakes, nothing was sent:\n{}{}", list(mistakes), more(*further))]
    Mistakes { path: String, mistakes: Vec<Mistake>, further: usize },
}

/// What is wrong with one line.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Mistake {
    line: usize,
    what: String,
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "  line {}: {}", self.line, self.what)
    }
}

fn list(mistakes: &[Mistake]) -> String {
    mistakes.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
}

fn more(further: usize) -> String {
    if further == 0 { String::new() } else { format!("\n  and {further} more") }
}

/// Reads and checks the whole file.
pub(crate) fn read(path: &Path) -> Result<Vec<Purchase>, FileError> {
    let name = path.display().to_string();
    let unreadable = |error| FileError::Unreadable { path: name.clone(), error };
    let bytes = std::fs::metadata(path).map_err(unreadable)?.len();
    if bytes > FILE_BYTES_MAX {
        return Err(FileError::TooLarge { path: name, bytes });
    }
    let content = std::fs::read(path).map_err(unreadable)?;
    let (purchases, mut mistakes) = parse(&content);
    if !mistakes.is_empty() {
        let further = mistakes.len().saturating_sub(MISTAKES_MAX);
        mistakes.truncate(MISTAKES_MAX);
        return Err(FileError::Mistakes { path: name, mistakes, further });
    }
    if purchases.is_empty() { Err(FileError::Empty { path: name }) } else { Ok(purchases) }
}

/// The purchases, and what is wrong with the other lines. Blank lines and a header are passed over.
fn parse(content: &[u8]) -> (Vec<Purchase>, Vec<Mistake>) {
    let content = content.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(content);
    let (mut purchases, mut mistakes, mut seen_text) = (Vec::new(), Vec::new(), false);
    for (index, bytes) in content.split(|byte| *byte == b'\n').enumerate() {
        let line = index + 1;
        let text = match std::str::from_utf8(bytes) {
            Ok(text) => text.trim(),
            Err(error) => {
                mistakes.push(Mistake { line, what: format!("is not UTF-8: {error}") });
                continue;
            }
        };
        let is_header = !seen_text && text.starts_with("customer_id");
        seen_text |= !text.is_empty();
        if text.is_empty() || is_header {
            continue;
        }
        match parse_line(line, text) {
            Ok(purchase) => purchases.push(purchase),
            Err(what) => mistakes.push(Mistake { line, what }),
        }
    }
    (purchases, mistakes)
}

fn parse_line(line: usize, text: &str) -> Result<Purchase, String> {
    let mut columns = text.split_whitespace();
    let customer = column(&mut columns, "customer id")?;
    let date = column(&mut columns, "date")?;
    let quantity = column(&mut columns, "number of CDs")?;
    let dollars = column(&mut columns, "dollar value")?;
    if let Some(extra) = columns.next() {
        return Err(format!("has a fifth column, {:?}; it takes four", shown(extra)));
    }
    check_customer(customer).map_err(|error| error.to_string())?;
    Ok(Purchase {
        line,
        customer: customer.to_owned(),
        date: parse_date(date)
            .ok_or_else(|| format!("date {:?} is not a day as YYYYMMDD", shown(date)))?,
        quantity: whole(quantity).filter(|count| (1..=QUANTITY_MAX).contains(count)).ok_or_else(
            || format!("number of CDs {:?} is not within 1 to {QUANTITY_MAX}", shown(quantity)),
        )?,
        amount_cents: cents(dollars).filter(|cents| *cents <= AMOUNT_CENTS_MAX).ok_or_else(
            || {
                format!(
                    "dollar value {:?} is not DOLLARS or DOLLARS.CENTS of at most {}",
                    shown(dollars),
                    AMOUNT_CENTS_MAX / 100
                )
            },
        )?,
    })
}

fn column<'a>(columns: &mut SplitWhitespace<'a>, name: &str) -> Result<&'a str, String> {
    columns.next().ok_or_else(|| format!("ends before the {name}"))
}

fn shown(text: &str) -> String {
    text.chars().take(40).collect()
}

fn parse_date(text: &str) -> Option<NaiveDate> {
    if text.len() != 8 || !text.is_ascii() {
        return None;
    }
    let (year, month, day) = (whole(&text[..4])?, whole(&text[4..6])?, whole(&text[6..])?);
    // Four and two digits fit.
    NaiveDate::from_ymd_opt(year as i32, month as u32, day as u32).filter(|_| year >= 1900)
}

/// Digits only: `parse` alone would take a sign.
fn whole(text: &str) -> Option<i64> {
    let is_digits = text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|_| is_digits)
}

/// Dollars in cents, exactly: at most two decimals, and no floating point on the way.
fn cents(text: &str) -> Option<i64> {
    let (dollars, decimals) = text.split_once('.').unwrap_or((text, "0"));
    let cents = match decimals.len() {
        1 => whole(decimals)? * 10,
        2 => whole(decimals)?,
        _ => return None,
    };
    whole(dollars)?.checked_mul(100)?.checked_add(cents)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = " customer_id  date number_of_cds  dollar_value\r\n \
                        00001 19970101  1   11.77\r\n\r\n\t00002 19970112 12   12\n";

    #[test]
    fn a_purchase_knows_its_line_of_the_file() {
        let (purchases, mistakes) = parse(GOOD.as_bytes());
        assert_eq!(mistakes, []);
        let read: Vec<_> = purchases
            .iter()
            .map(|one| (one.order_id(), one.customer.as_str(), one.quantity, one.amount_cents))
            .collect();
        assert_eq!(
            read,
            [("cdnow-2".into(), "00001", 1, 1177), ("cdnow-4".into(), "00002", 12, 1200)]
        );
        assert_eq!(purchases[0].placed_at().to_rfc3339(), "1997-01-01T00:00:00+00:00");
    }

    #[test]
    fn a_line_keeps_its_commands_and_a_changed_one_gets_others() {
        let (purchases, _) = parse(GOOD.as_bytes());
        let first = &purchases[0];
        // Written down: with another id the next import would place everything again.
        assert_eq!(first.command_id("place").to_string(), "4f6cfbed-d7f5-511c-90a2-8523a82b2ef7");
        let changed = Purchase { amount_cents: 1178, ..first.clone() };
        assert_ne!(first.command_id("place"), first.command_id("pay"));
        assert_ne!(first.command_id("place"), changed.command_id("place"));
    }

    #[test]
    fn dollars_become_cents_exactly() {
        for (text, expected) in [("0.00", 0), ("11.77", 1177), ("12", 1200), ("0.5", 50)] {
            assert_eq!(cents(text), Some(expected), "{text}");
        }
        for bad in ["", ".", "1.", ".5", "1.234", "-1.00", "+1", "1,00", "1e3", "1.-1", "NaN"] {
            assert_eq!(cents(bad), None, "{bad}");
        }
        assert_eq!(cents(&i64::MAX.to_string()), None);
    }

    #[test]
    fn every_mistake_is_told_with_its_line() {
        let bad = b"1 19970101 1 1.00\n1 19970230 1 1.00\n1 19970101 0 1.00\n1 19970101 1\n\
                    1 19970101 1 1.00 x\n1 19970101 1 -1.00\n\xff 19970101 1 1.00\ncustomer_id\n";
        let (purchases, mistakes) = parse(bad);
        assert_eq!(purchases.len(), 1);
        let lines: Vec<_> = mistakes.iter().map(|mistake| mistake.line).collect();
        assert_eq!(lines, [2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(mistakes[2].to_string(), "  line 4: ends before the dollar value");
    }

    #[test]
    fn every_line_of_the_corpus_gets_its_verdict() {
        let cases = include_str!("corpus.txt").lines();
        for case in cases.filter(|line| !line.is_empty() && !line.starts_with('#')) {
            let (json, verdict) = case.rsplit_once(" => ").expect(case);
            let text: String = serde_json::from_str(json).expect(case);
            let found = match parse(text.as_bytes()) {
                (purchases, mistakes) if purchases.is_empty() && mistakes.is_empty() => {
                    "nothing".to_owned()
                }
                (purchases, mistakes) if mistakes.is_empty() => {
                    let Purchase { customer, date, quantity, amount_cents, .. } = &purchases[0];
                    format!("{customer} {date} {quantity} {amount_cents}")
                }
                (_, mistakes) => mistakes[0].to_string(),
            };
            assert!(found.contains(verdict), "{case}\nis {found}");
            assert!(found.chars().count() < 300, "{case}\nis told at length: {found}");
        }
    }

    #[test]
    fn no_bytes_of_the_real_file_make_reading_panic_or_pass_a_mistake_over() {
        let sample = include_bytes!("../../tests/data/cdnow_sample.txt");
        let whole = parse(sample).0.len();
        for at in 0..sample.len() {
            for odd in [0, b' ', b'\n', b'9', b'-', 0xff, sample[at] ^ 0x80] {
                let mut changed = sample[at / 100 * 100..].to_vec();
                changed[at % 100] = odd;
                changed.truncate(200);
                let (purchases, mistakes) = parse(&changed);
                let lines = changed.split(|byte| *byte == b'\n').count();
                assert!(purchases.len() + mistakes.len() <= lines, "{odd} at {at}");
            }
            // Cut anywhere, no more purchases are found than there are.
            assert!(at % 97 != 0 || parse(&sample[..at]).0.len() <= whole);
        }
    }

    #[test]
    fn the_sample_of_the_real_file_is_read_whole() {
        let (purchases, mistakes) = parse(include_bytes!("../../tests/data/cdnow_sample.txt"));
        assert_eq!((purchases.len(), mistakes.len()), (199, 0));
    }
}
