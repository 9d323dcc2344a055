//! What differs between two texts, line by line.

use std::time::Duration;

use similar::{ChangeTag, TextDiff};

/// Lines around a difference that are shown with it.
const CONTEXT: usize = 2;
/// Time limit of the search for the shortest difference; afterwards a longer difference is shown.
const SEARCH_TIMEOUT: Duration = Duration::from_millis(500);

/// The lines that differ, begun by `-` and `+`, with some equal ones around them, begun by a blank;
/// `…` stands for others. Nothing when the texts are equal.
pub(crate) fn diff(before: &str, after: &str) -> Vec<String> {
    let (before, after): (Vec<_>, Vec<_>) = (before.lines().collect(), after.lines().collect());
    let found = TextDiff::configure().timeout(SEARCH_TIMEOUT).diff_slices(&before, &after);
    let groups = found.grouped_ops(CONTEXT);
    let shown = groups.iter().map(|group| {
        let changes = group.iter().flat_map(|operation| found.iter_changes(operation));
        let line = |change: similar::Change<&str>| match change.tag() {
            ChangeTag::Equal => format!("  {}", change.value()),
            ChangeTag::Delete => format!("- {}", change.value()),
            ChangeTag::Insert => format!("+ {}", change.value()),
        };
        changes.map(line).collect::<Vec<_>>()
    });
    shown.collect::<Vec<_>>().join(&"…".to_owned())
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
