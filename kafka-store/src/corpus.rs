//! Inputs that others could make, with what is to be said of each: text files, read by the tests beside
//! the code that they are for.

pub(crate) const RECORDS: &str = include_str!("corpus/records.txt");
pub(crate) const CURSORS: &str = include_str!("corpus/cursors.txt");
pub(crate) const COMMANDS: &str = include_str!("corpus/commands.txt");
pub(crate) const URLS: &str = include_str!("corpus/urls.txt");

/// Every case with its verdict to `judge`, which tells what it found instead; `None` where it does not
/// understand the case.
#[track_caller]
pub(crate) fn check(corpus: &str, judge: impl Fn(&str, &str) -> Option<Result<(), String>>) {
    let mut wrong = Vec::new();
    for (line, case) in corpus.lines().enumerate() {
        if case.is_empty() || case.starts_with('#') {
            continue;
        }
        let line = line + 1;
        match case.split_once(" => ").and_then(|(input, verdict)| judge(input, verdict)) {
            Some(Ok(())) => {}
            Some(Err(found)) => wrong.push(format!("line {line}: {case}\nbut it is {found:.300}")),
            None => wrong.push(format!("line {line} cannot be understood: {case}")),
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// `found` is what the verdict says.
pub(crate) fn demand(holds: bool, found: impl std::fmt::Debug) -> Option<Result<(), String>> {
    Some(if holds { Ok(()) } else { Err(format!("{found:?}")) })
}

pub(crate) fn unhex(text: &[u8]) -> Option<Vec<u8>> {
    let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
    text.chunks(2).map(byte).collect()
}

/// `\xHH` is a byte, `\_` a space, `*N{TEXT}` the text N times.
pub(crate) fn unescape(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        if let Some(hex) = rest.strip_prefix("\\x") {
            bytes.extend(unhex(hex.get(..2)?.as_bytes())?);
            rest = &hex[2..];
        } else if let Some(after) = rest.strip_prefix("\\_") {
            bytes.push(b' ');
            rest = after;
        } else if let Some((count, after)) = repetition(rest) {
            let (repeated, after) = after.split_once('}')?;
            bytes.extend(repeated.repeat(count).into_bytes());
            rest = after;
        } else {
            bytes.extend(first.to_string().into_bytes());
            rest = &rest[first.len_utf8()..];
        }
    }
    Some(bytes)
}

fn repetition(text: &str) -> Option<(usize, &str)> {
    let (count, after) = text.strip_prefix('*')?.split_once('{')?;
    Some((count.parse().ok()?, after))
}
