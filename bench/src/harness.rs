//! Pairs of ours and a baseline, their ratios, and what is kept of them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use serde::Serialize;

use crate::Failure;
use crate::servers::Servers;
use crate::svg::Chart;

/// Where the figures are in the page.
const FIGURES_BEGIN: &str = "<!-- figures, as dev/bench writes them -->";
const FIGURES_END: &str = "<!-- end of the figures -->";
const FIGURES_HEAD: &str = "\
| row | case | figure | ratio | quartiles | all | ours | baseline | goal | |
|---|---|---|---|---|---|---|---|---|---|";

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
    /// The table in `docs/performance.md`: an hour or more.
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

    fn shown(self) -> String {
        match self {
            Self::AtLeast(least) => format!("≥ {least}"),
            Self::AtMost(most) => format!("≤ {most}"),
            Self::Stated => "stated".to_owned(),
        }
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

    /// Its lines in the table of figures.
    fn lines(&self) -> impl Iterator<Item = String> {
        self.figures.iter().map(|figure| {
            let Figure { metric, goal, ratio, ours, baseline, met } = figure;
            let (median_ratio, quartiles, all) = match ratio {
                Some(Spread { min, q1, median, q3, max }) => {
                    (format!("{median:.2}"), format!("{q1:.2}–{q3:.2}"), format!("{min:.2}–{max:.2}"))
                }
                None => Default::default(),
            };
            let (ours, baseline) = (median(*ours), median(*baseline));
            let (goal, met) = (goal.shown(), met.map_or("", met_or_not));
            let (row, case) = (self.row, &self.case);
            format!(
                "| {row} | {case} | {metric} | {median_ratio} | {quartiles} | {all} | {ours} | {baseline} \
                 | {goal} | {met} |"
            )
        })
    }

    #[expect(clippy::print_stdout, reason = "the benchmark's own output")]
    fn print(&self) {
        for figure in &self.figures {
            let Figure { metric, goal, ratio, ours, baseline, met } = figure;
            let (ours, goal) = (median(*ours), goal.shown());
            let shown = match ratio {
                Some(Spread { min, q1, median: ratio, q3, max }) => {
                    let (baseline, met) = (median(*baseline), met.map_or("", met_or_not));
                    format!(
                        "ratio {ratio:.3} (quartiles {q1:.3}–{q3:.3}, all {min:.3}–{max:.3})  \
                         ours {ours}  baseline {baseline}  goal {goal} {met}"
                    )
                }
                None => format!("ours {ours}"),
            };
            println!("{:<4} {:<48} {metric:<14} {shown}", self.row, self.case);
        }
        for note in &self.notes {
            println!("{:<4} {:<48} {note}", self.row, self.case);
        }
    }
}

/// The page with these figures of a row in the place of those it had.
fn with_figures(page: &str, row: &str, compared: &[Comparison]) -> Result<String, Failure> {
    let parts = page.split_once(FIGURES_BEGIN).and_then(|(before, rest)| {
        let (figures, after) = rest.split_once(FIGURES_END)?;
        Some((before, figures, after))
    });
    let (before, figures, after) = parts.ok_or("the page has no place for the figures")?;
    let row_of = |line: &str| line.split('|').nth(1).map(|row| row.trim().to_owned());
    let number_of = |line: &str| row_of(line)?.strip_prefix('R')?.parse::<u32>().ok();
    let is_kept = |line: &&str| number_of(line).is_some() && row_of(line).as_deref() != Some(row);
    let mut lines: Vec<_> = figures.lines().filter(is_kept).map(str::to_owned).collect();
    lines.extend(compared.iter().flat_map(Comparison::lines));
    lines.sort_by_key(|line| number_of(line));
    let lines = lines.join("\n");
    Ok(format!("{before}{FIGURES_BEGIN}\n{FIGURES_HEAD}\n{lines}\n{FIGURES_END}{after}"))
}

fn values(samples: &[Sample], metric: &str) -> Vec<f64> {
    samples.iter().filter_map(|sample| sample.get(metric).copied()).collect()
}

fn median(spread: Option<Spread>) -> String {
    spread.map(|spread| number(spread.median)).unwrap_or_default()
}

fn met_or_not(met: bool) -> &'static str {
    if met { "met" } else { "NOT MET" }
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
    /// Where curves go as well, when they are to be kept; the page of the same name has the figures.
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

    /// Writes the raw samples of a row, and its figures into the page if they are to be kept.
    pub fn write(&self, row: &str) -> Result<(), Failure> {
        std::fs::create_dir_all(&self.folder)?;
        let path = self.folder.join(format!("{row}.json"));
        let compared = self.compared(row);
        std::fs::write(path, serde_json::to_vec_pretty(&compared)?)?;
        if let Some(kept) = &self.kept {
            let page = kept.with_extension("md");
            let shown = with_figures(&std::fs::read_to_string(&page)?, row, &compared)?;
            std::fs::write(page, shown)?;
        }
        Ok(())
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
    fn figures_of_a_row_take_the_place_of_those_it_had() {
        let old =
            "| R1 | old | per_s | 0.50 | | | 1 | 2 | | |\n| R10 | kept | per_s | 9 | | | | | | |";
        let page = format!("# Title\n{FIGURES_BEGIN}\n{FIGURES_HEAD}\n{old}\n{FIGURES_END}\nRest");
        let sample = |per_s| Sample::from([("per_s", per_s)]);
        let (ours, baseline) = (vec![sample(3.0), sample(1.0)], vec![sample(4.0), sample(4.0)]);
        let figures = [("per_s", Goal::AtLeast(0.4))];
        let bench = Bench::new(Size::Test, Servers::own("none"), Path::new("none"), None);
        let compared = |row| bench.keep(row, "new", &figures, ours.clone(), baseline.clone());
        let page = with_figures(&page, "R1", &[compared("R1")]).expect("there is a place");
        let page = with_figures(&page, "R2", &[compared("R2")]).expect("there is a place");
        let line = |row| {
            format!(
                "| {row} | new | per_s | 0.50 | 0.38–0.62 | 0.25–0.75 | 2.000 | 4.000 | ≥ 0.4 | met |"
            )
        };
        let kept = "| R10 | kept | per_s | 9 | | | | | | |";
        let figures = [line("R1").as_str(), &line("R2"), kept].join("\n");
        let expected =
            format!("# Title\n{FIGURES_BEGIN}\n{FIGURES_HEAD}\n{figures}\n{FIGURES_END}\nRest");
        assert_eq!(page, expected);
        assert!(with_figures("no place", "R1", &[]).is_err());
    }

    #[test]
    fn numbers_are_read_by_people() {
        assert_eq!(number(1_234_567.8), "1 234 568");
        assert_eq!(number(12.34), "12.3");
        assert_eq!(number(0.5), "0.500");
    }
}
