//! What differs between two texts, line by line.

/// Lines around a difference that are shown with it.
const CONTEXT: usize = 2;
/// Texts whose lines multiply to more than this are compared at their ends only: time and memory grow
/// with the product.
const PRODUCT_MAX: usize = 4_000_000;

/// The lines that differ, begun by `-` and `+`, with some equal ones around them, begun by a blank;
/// `…` stands for others. Nothing when the texts are equal.
pub(crate) fn diff(before: &str, after: &str) -> Vec<String> {
    let (before, after): (Vec<_>, Vec<_>) = (before.lines().collect(), after.lines().collect());
    let edits = edits(&before, &after);
    let is_near = |at: usize| {
        let around = at.saturating_sub(CONTEXT)..(at + CONTEXT + 1).min(edits.len());
        edits[around].iter().any(|(sign, _)| *sign != ' ')
    };
    let mut lines = Vec::new();
    let mut left_out = false;
    for (at, (sign, line)) in edits.iter().enumerate() {
        if !is_near(at) {
            left_out = true;
            continue;
        }
        if std::mem::take(&mut left_out) && !lines.is_empty() {
            lines.push("…".to_owned());
        }
        lines.push(format!("{sign} {line}"));
    }
    lines
}

/// Every line of both texts, each once, and whether it stays, goes or comes.
fn edits<'t>(before: &[&'t str], after: &[&'t str]) -> Vec<(char, &'t str)> {
    let same = |(a, b): &(&&str, &&str)| a == b;
    let head = before.iter().zip(after).take_while(same).count();
    let (old, new) = (&before[head..], &after[head..]);
    let tail = old.iter().rev().zip(new.iter().rev()).take_while(same).count();
    let (old, new) = (&old[..old.len() - tail], &new[..new.len() - tail]);
    let keep = |lines: &[&'t str]| lines.iter().map(|line| (' ', *line)).collect::<Vec<_>>();
    let mut edits = keep(&before[..head]);
    edits.extend(middle(old, new));
    edits.extend(keep(&before[before.len() - tail..]));
    edits
}

/// By the longest common subsequence, or, of texts that are too long for it, all of both.
fn middle<'t>(old: &[&'t str], new: &[&'t str]) -> Vec<(char, &'t str)> {
    let (rows, columns) = (old.len() + 1, new.len() + 1);
    let mut edits = Vec::with_capacity(old.len() + new.len());
    let (mut i, mut j) = (0, 0);
    if rows.saturating_mul(columns) <= PRODUCT_MAX {
        // Cell (i, j): how many lines the rests from i and j on have in common, in order.
        let mut common = vec![0u32; rows * columns];
        for i in (0..old.len()).rev() {
            for j in (0..new.len()).rev() {
                common[i * columns + j] = match old[i] == new[j] {
                    true => common[(i + 1) * columns + j + 1] + 1,
                    false => common[(i + 1) * columns + j].max(common[i * columns + j + 1]),
                };
            }
        }
        while i < old.len() && j < new.len() {
            if old[i] == new[j] {
                edits.push((' ', old[i]));
                (i, j) = (i + 1, j + 1);
            } else if common[(i + 1) * columns + j] >= common[i * columns + j + 1] {
                edits.push(('-', old[i]));
                i += 1;
            } else {
                edits.push(('+', new[j]));
                j += 1;
            }
        }
    }
    edits.extend(old[i..].iter().map(|line| ('-', *line)));
    edits.extend(new[j..].iter().map(|line| ('+', *line)));
    edits
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(before: &str, after: &str, expected: &[&str]) {
        let words = |text: &str| text.replace(' ', "\n");
        assert_eq!(diff(&words(before), &words(after)), expected);
    }

    #[test]
    fn only_what_differs_is_shown_with_a_little_around_it() {
        check("a b c", "a b c", &[]);
        check("", "a", &["+ a"]);
        check("a b c", "a x c", &["  a", "- b", "+ x", "  c"]);
        check("a b c", "a c", &["  a", "- b", "  c"]);
        check(
            "1 2 3 4 5 6 7 8 9",
            "1 2 x 4 5 6 7 8 y",
            &["  1", "  2", "- 3", "+ x", "  4", "  5", "…", "  7", "  8", "- 9", "+ y"],
        );
    }
}
