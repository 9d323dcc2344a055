//! Pairs of ours and a baseline, their ratios, and what is kept of them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use serde::Serialize;

use crate::Failure;
use crate::servers::Servers;
use crate::svg::Chart;

/// What one run came to, by the name of what was measured. Names of durations end with their unit;
/// `per_s` is a rate.
pub type Sample = BTreeMap<&'static str, f64>;

/// How much is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Size {
    /// Whether it works at all, and nothing is slower by an order: seconds a row.
    Test,
    /// A first look: minutes for all rows.
    Quick,
    /// The table in `docs/performance.md`: hours.
    Full,
}

impl Size {
    /// The one of these for this size.
    pub fn of<T>(self, test: T, quick: T, full: T) -> T {
        match self {
            Self::Test => test,
            Self::Quick => quick,
            Self::Full => full,
        }
    }

    /// How often each side runs.
    pub fn pairs(self) -> usize {
        self.of(2, 4, 8)
    }
}

/// What a ratio is to be.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Goal {
    /// So much or more.
    AtLeast(f64),
    /// So much or less.
    AtMost(f64),
    /// Whatever it is, it is told.
    Stated,
}

impl Goal {
    /// `None` when there is none.
    fn is_met(self, ratio: f64) -> Option<bool> {
        match self {
            Self::AtLeast(least) => Some(ratio >= least),
            Self::AtMost(most) => Some(ratio <= most),
            Self::Stated => None,
        }
    }

    fn shown(self, ratio: f64) -> String {
        let (sign, bound) = match self {
            Self::AtLeast(least) => ('≥', least),
            Self::AtMost(most) => ('≤', most),
            Self::Stated => return "stated".to_owned(),
        };
        let met = if self.is_met(ratio) == Some(true) { "met" } else { "NOT MET" };
        format!("goal {sign} {bound}: {met}")
    }
}

/// How a number varies over the pairs.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Spread {
    /// The smallest.
    pub min: f64,
    /// A quarter is not larger.
    pub q1: f64,
    /// Half is not larger.
    pub median: f64,
    /// Three quarters are not larger.
    pub q3: f64,
    /// The largest.
    pub max: f64,
}

impl Spread {
    /// `None` of no numbers.
    pub fn of(numbers: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut numbers: Vec<_> = numbers.into_iter().collect();
        numbers.sort_by(f64::total_cmp);
        let last = numbers.len().checked_sub(1)?;
        let at = |share: f64| {
            let place = share * last as f64;
            let (below, above) = (numbers[place.floor() as usize], numbers[place.ceil() as usize]);
            below + (above - below) * place.fract()
        };
        Some(Self { min: at(0.0), q1: at(0.25), median: at(0.5), q3: at(0.75), max: at(1.0) })
    }
}

/// One number of the samples that is compared.
#[derive(Debug, Clone, Serialize)]
pub struct Figure {
    /// Its name in the samples.
    pub metric: &'static str,
    /// What its ratio is to be.
    pub goal: Goal,
    /// Ours over the baseline's, pair by pair; `None` where there is no baseline.
    pub ratio: Option<Spread>,
    /// Ours.
    pub ours: Option<Spread>,
    /// The baseline's.
    pub baseline: Option<Spread>,
    /// Whether the median ratio is what it is to be.
    pub met: Option<bool>,
}

/// Ours against a baseline in one case of a row.
#[derive(Debug, Clone, Serialize)]
pub struct Comparison {
    /// The row of the table, such as `R1`.
    pub row: &'static str,
    /// What of it.
    pub case: String,
    /// What it came to.
    pub figures: Vec<Figure>,
    /// What was chosen or noticed on the way.
    pub notes: Vec<String>,
    /// Ours, in the order of the runs.
    pub ours: Vec<Sample>,
    /// The baseline's, each run after ours of the same place.
    pub baseline: Vec<Sample>,
}

impl Comparison {
    /// The median ratio of a figure.
    pub fn ratio(&self, metric: &str) -> Option<f64> {
        let figure = self.figures.iter().find(|figure| figure.metric == metric)?;
        figure.ratio.map(|ratio| ratio.median)
    }

    /// The medians of ours and of the baseline.
    pub fn medians(&self, metric: &str) -> (Option<f64>, Option<f64>) {
        let of = |samples: &[Sample]| Spread::of(values(samples, metric)).map(|s| s.median);
        (of(&self.ours), of(&self.baseline))
    }

    fn figure(&self, metric: &'static str, goal: Goal) -> Figure {
        let pairs = self.ours.iter().zip(&self.baseline);
        let ratios = pairs.filter_map(|(ours, base)| Some(ours.get(metric)? / base.get(metric)?));
        let ratio = Spread::of(ratios);
        let ours = Spread::of(values(&self.ours, metric));
        let baseline = Spread::of(values(&self.baseline, metric));
        let met = ratio.and_then(|ratio| goal.is_met(ratio.median));
        Figure { metric, goal, ratio, ours, baseline, met }
    }

    #[expect(clippy::print_stdout, reason = "the benchmark's own output")]
    fn print(&self) {
        for figure in &self.figures {
            let Figure { metric, goal, ratio, ours, baseline, .. } = figure;
            let absolute = |spread: &Option<Spread>| spread.map(|s| number(s.median));
            let ours = absolute(ours).unwrap_or_default();
            let shown = match (ratio, absolute(baseline)) {
                (Some(ratio), Some(baseline)) => {
                    let Spread { min, q1, median, q3, max } = ratio;
                    let goal = goal.shown(*median);
                    format!(
                        "ratio {median:.3} (quartiles {q1:.3}–{q3:.3}, all {min:.3}–{max:.3})  \
                         ours {ours}  baseline {baseline}  {goal}"
                    )
                }
                _ => format!("ours {ours}"),
            };
            println!("{:<4} {:<48} {metric:<14} {shown}", self.row, self.case);
        }
        for note in &self.notes {
            println!("{:<4} {:<48} {note}", self.row, self.case);
        }
    }
}

fn values(samples: &[Sample], metric: &str) -> Vec<f64> {
    samples.iter().filter_map(|sample| sample.get(metric).copied()).collect()
}

fn number(value: f64) -> String {
    match value {
        value if value >= 1_000.0 => {
            let digits = format!("{value:.0}");
            let groups: Vec<_> = digits.as_bytes().rchunks(3).rev().collect();
            let text = groups.iter().map(|group| String::from_utf8_lossy(group).into_owned());
            text.collect::<Vec<_>>().join(" ")
        }
        value if value >= 10.0 => format!("{value:.1}"),
        value => format!("{value:.3}"),
    }
}

/// What all benchmarks of a run share.
pub struct Bench {
    /// How much is measured.
    pub size: Size,
    /// Brokers and databases.
    pub servers: Servers,
    /// Where raw samples and curves go.
    folder: PathBuf,
    /// Where curves go as well, when they are to be kept.
    kept: Option<PathBuf>,
    done: Mutex<Vec<Comparison>>,
}

impl Bench {
    /// Keeps samples and curves in `folder`, and the curves in `kept` too.
    pub fn new(size: Size, servers: Servers, folder: &Path, kept: Option<PathBuf>) -> Self {
        Self { size, servers, folder: folder.to_owned(), kept, done: Mutex::default() }
    }

    /// Runs ours and the baseline in turn after a warm-up of each, tells what came of it and keeps
    /// it.
    pub async fn compare(
        &self,
        row: &'static str,
        case: impl Into<String>,
        figures: &[(&'static str, Goal)],
        mut ours: impl AsyncFnMut() -> Result<Sample, Failure>,
        mut baseline: impl AsyncFnMut() -> Result<Sample, Failure>,
    ) -> Result<Comparison, Failure> {
        drop((ours().await?, baseline().await?));
        let (mut of_ours, mut of_baseline) = (Vec::new(), Vec::new());
        for _ in 0..self.size.pairs() {
            of_ours.push(ours().await?);
            of_baseline.push(baseline().await?);
        }
        Ok(self.keep(row, case, figures, of_ours, of_baseline))
    }

    /// Tells and keeps what was measured elsewhere: samples of the same place are a pair.
    pub fn keep(
        &self,
        row: &'static str,
        case: impl Into<String>,
        figures: &[(&'static str, Goal)],
        ours: Vec<Sample>,
        baseline: Vec<Sample>,
    ) -> Comparison {
        let (figured, notes) = (Vec::new(), Vec::new());
        let case = case.into();
        let mut comparison = Comparison { row, case, figures: figured, notes, ours, baseline };
        comparison.figures =
            figures.iter().map(|(metric, goal)| comparison.figure(metric, *goal)).collect();
        comparison.print();
        self.done().push(comparison.clone());
        comparison
    }

    /// Adds a sentence to what was kept last.
    #[expect(clippy::print_stdout, reason = "the benchmark's own output")]
    pub fn note(&self, note: impl Into<String>) {
        let note = note.into();
        if let Some(last) = self.done().last_mut() {
            println!("{:<4} {:<48} {note}", last.row, last.case);
            last.notes.push(note);
        }
    }

    /// What was compared for a row so far.
    pub fn compared(&self, row: &str) -> Vec<Comparison> {
        self.done().iter().filter(|comparison| comparison.row == row).cloned().collect()
    }

    /// Writes the raw samples of a row.
    pub fn write(&self, row: &str) -> Result<(), Failure> {
        std::fs::create_dir_all(&self.folder)?;
        let path = self.folder.join(format!("{row}.json"));
        Ok(std::fs::write(path, serde_json::to_vec_pretty(&self.compared(row))?)?)
    }

    /// Draws a curve.
    pub fn draw(&self, name: &str, chart: &Chart) -> Result<(), Failure> {
        let svg = chart.svg();
        for folder in [Some(&self.folder), self.kept.as_ref()].into_iter().flatten() {
            std::fs::create_dir_all(folder)?;
            std::fs::write(folder.join(format!("{name}.svg")), &svg)?;
        }
        Ok(())
    }

    fn done(&self) -> std::sync::MutexGuard<'_, Vec<Comparison>> {
        self.done.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spreads_are_those_of_the_sorted_numbers() {
        let spread = Spread::of([4.0, 1.0, 3.0, 2.0, 5.0]).expect("numbers");
        let Spread { min, q1, median, q3, max } = spread;
        assert_eq!((min, q1, median, q3, max), (1.0, 2.0, 3.0, 4.0, 5.0));
        assert_eq!(Spread::of([1.0, 2.0]).map(|spread| spread.median), Some(1.5));
        assert_eq!(Spread::of([]), None);
    }

    #[test]
    fn numbers_are_read_by_people() {
        assert_eq!(number(1_234_567.8), "1 234 568");
        assert_eq!(number(12.34), "12.3");
        assert_eq!(number(0.5), "0.500");
    }
}
