//! `top`: nodes, partitions and projections, live, with rates.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use kafold::projections::{Overview, OverviewState};
use kafold::{Database, Offset, Partition};
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyModifiers};
use ratatui::layout::{Constraint, Layout};
use ratatui::style::{Style, Stylize};
use ratatui::text::Line;
use ratatui::widgets::{Row, Table};
use ratatui::{DefaultTerminal, Frame};
use serde_json::{Value, json};
use tokio::sync::mpsc;

use crate::admin::Context;
use crate::error::Error;
use crate::log::Log;
use crate::output::{count, printable, thousands};
use crate::overview::{self, PartitionView};

/// How often the keyboard is looked at.
const KEY_INTERVAL: Duration = Duration::from_millis(100);

#[derive(Debug, Clone, clap::Args)]
pub(crate) struct TopArgs {
    /// Seconds between two looks.
    #[arg(long, value_name = "SECONDS", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=60))]
    interval: u64,
    /// Ends after so many looks.
    #[arg(long, value_name = "N")]
    looks: Option<u64>,
}

/// What is looked at.
struct Watched {
    log: Option<Log>,
    database: Option<Database>,
    title: String,
}

/// What one look has seen.
#[derive(Clone)]
struct Sample {
    at: Instant,
    partitions: Vec<PartitionView>,
    index: BTreeMap<Partition, Offset>,
    projections: Vec<Overview>,
}

pub(crate) async fn run(context: &mut Context, args: TopArgs) -> Result<(), Error> {
    context.options.check_any()?;
    let is_screen = !context.out.json;
    if is_screen && !std::io::stdout().is_terminal() {
        return Err(Error::usage(
            "top draws on a terminal, and standard output is none: use `status`, or add --json",
        ));
    }
    let watched = Watched::open(context).await?;
    let mut before = watched.look(context).await?;
    if !is_screen {
        return print(context, &watched, before, &args).await;
    }
    let mut terminal = ratatui::init();
    let mut keys = keys();
    let mut trouble = None;
    let mut looks = 0;
    let ended = loop {
        context.clock.sleep(KEY_INTERVAL).await;
        if keys.try_recv().is_ok() {
            break Ok(());
        }
        if context.clock.instant() < before.at + Duration::from_secs(args.interval) {
            continue;
        }
        // A log or a database that is away is shown, not the end.
        let now = match watched.look(context).await {
            Ok(now) => now,
            Err(error) => {
                trouble = Some(error.reason().to_owned());
                Sample { at: context.clock.instant(), ..before.clone() }
            }
        };
        if let Err(error) = draw(&mut terminal, &View::new(&watched, &before, &now, &trouble)) {
            break Err(error);
        }
        before = now;
        trouble = None;
        looks += 1;
        if args.looks.is_some_and(|most| looks >= most) {
            break Ok(());
        }
    };
    ratatui::restore();
    ended
}

/// A line of JSON a look.
async fn print(
    context: &mut Context,
    watched: &Watched,
    mut before: Sample,
    args: &TopArgs,
) -> Result<(), Error> {
    let mut looks = 0;
    while args.looks.is_none_or(|most| looks < most) {
        context.clock.sleep(Duration::from_secs(args.interval)).await;
        let now = watched.look(context).await?;
        let view = View::new(watched, &before, &now, &None);
        context.out.json_line(&view.json())?;
        context.out.flush()?;
        before = now;
        looks += 1;
    }
    Ok(())
}

/// Tells when the reader wants to leave: q, Esc or Ctrl-C. Ends when nobody listens any more.
fn keys() -> mpsc::Receiver<()> {
    let (leave, left) = mpsc::channel(1);
    tokio::task::spawn_blocking(move || {
        while !leave.is_closed() {
            let is_leaving = match event::poll(KEY_INTERVAL) {
                Ok(true) => matches!(event::read(), Ok(Event::Key(key)) if leaves(key)),
                Ok(false) => false,
                // Without a keyboard only a signal ends it.
                Err(_) => return,
            };
            if is_leaving && leave.blocking_send(()).is_err() {
                return;
            }
        }
    });
    left
}

fn leaves(key: KeyEvent) -> bool {
    let is_control = key.modifiers.contains(KeyModifiers::CONTROL);
    match key.code {
        KeyCode::Char('q') | KeyCode::Esc => true,
        KeyCode::Char('c') => is_control,
        _ => false,
    }
}

impl Watched {
    async fn open(context: &Context) -> Result<Self, Error> {
        let url = context.options.maybe_log()?;
        let log = match &url {
            Some(url) => Some(Log::open(url, &context.clock).await?),
            None => None,
        };
        let database = context.options.maybe_database().await?;
        let shown = [url.map(|url| url.shown()), database.as_ref().map(|db| db.url().to_owned())];
        let title = shown.into_iter().flatten().collect::<Vec<_>>().join("   ");
        Ok(Self { log, database, title })
    }

    async fn look(&self, context: &Context) -> Result<Sample, Error> {
        let partitions = match &self.log {
            Some(log) => overview::partitions(log).await?,
            None => Vec::new(),
        };
        let mut sample = Sample {
            at: context.clock.instant(),
            index: BTreeMap::new(),
            projections: Vec::new(),
            partitions,
        };
        if let Some(database) = &self.database {
            let cursors = overview::index(database).await?;
            sample.index = cursors.into_iter().map(|(p, cursor)| (p, cursor.next)).collect();
            let ends = Some(sample.partitions.as_slice()).filter(|ends| !ends.is_empty());
            sample.projections = overview::projections(database, ends).await?;
        }
        Ok(sample)
    }
}

impl Sample {
    fn records(&self) -> u64 {
        self.partitions.iter().map(|seen| seen.end.0).sum()
    }
}

/// What is shown of two looks.
struct View<'v> {
    title: &'v str,
    seconds: f64,
    before: &'v Sample,
    now: &'v Sample,
    trouble: &'v Option<String>,
}

impl<'v> View<'v> {
    fn new(
        watched: &'v Watched,
        before: &'v Sample,
        now: &'v Sample,
        trouble: &'v Option<String>,
    ) -> Self {
        let seconds = now.at.saturating_duration_since(before.at).as_secs_f64().max(0.001);
        Self { title: &watched.title, seconds, before, now, trouble }
    }

    fn rate(&self, before: u64, now: u64) -> f64 {
        now.saturating_sub(before) as f64 / self.seconds
    }

    /// Records of the log, a second.
    fn log_rate(&self) -> f64 {
        self.rate(self.before.records(), self.now.records())
    }

    fn partition_rate(&self, seen: &PartitionView) -> f64 {
        let before = self.before.partitions.iter().find(|b| b.partition == seen.partition);
        before.map_or(0.0, |before| self.rate(before.end.0, seen.end.0))
    }

    /// Records that a projection applies, and its rebuild, a second.
    fn projection_rates(&self, seen: &Overview) -> (f64, f64) {
        let applied = |seen: &Overview| seen.partitions.iter().map(|place| place.next).sum::<u64>();
        let built =
            |seen: &Overview| seen.rebuild.as_ref().map_or(0, |rebuild| rebuild.records_done);
        let before = self.before.projections.iter().find(|before| before.name == seen.name);
        before.map_or((0.0, 0.0), |before| {
            // Another generation counts from its own beginning.
            let is_same = before.generation == seen.generation;
            let live = if is_same { self.rate(applied(before), applied(seen)) } else { 0.0 };
            (live, self.rate(built(before), built(seen)))
        })
    }

    /// Owners, as the newest claims tell, and what each has.
    fn nodes(&self) -> BTreeMap<String, (u64, f64)> {
        let mut nodes: BTreeMap<String, (u64, f64)> = BTreeMap::new();
        for seen in &self.now.partitions {
            let owner = seen.claim.as_ref().map_or("-".to_owned(), |(_, owner)| owner.to_string());
            let node = nodes.entry(owner).or_default();
            node.0 += 1;
            node.1 += self.partition_rate(seen);
        }
        nodes
    }

    fn index_lag(&self, seen: &PartitionView) -> Option<u64> {
        let next = self.now.index.get(&seen.partition)?;
        Some(seen.end.0.saturating_sub(next.0))
    }

    fn json(&self) -> Value {
        let partition = |seen: &PartitionView| {
            json!({
                "partition": seen.partition, "end": seen.end,
                "owner": seen.claim.as_ref().map(|(_, owner)| owner),
                "records_per_second": self.partition_rate(seen),
                "index_lag_records": self.index_lag(seen),
            })
        };
        let projection = |seen: &Overview| {
            let (applied, rebuilt) = self.projection_rates(seen);
            json!({
                "projection": seen, "records_per_second": applied,
                "rebuilt_per_second": rebuilt,
            })
        };
        json!({
            "records": self.now.records(),
            "records_per_second": self.log_rate(),
            "partitions": self.now.partitions.iter().map(partition).collect::<Vec<_>>(),
            "projections": self.now.projections.iter().map(projection).collect::<Vec<_>>(),
        })
    }

    fn render(&self, frame: &mut Frame<'_>) {
        let nodes = self.nodes();
        let heights = [
            Constraint::Length(2),
            Constraint::Length(nodes.len() as u16 + 2),
            Constraint::Length(self.now.projections.len() as u16 + 2),
            Constraint::Fill(1),
            Constraint::Length(1),
        ];
        let [head, node_area, projection_area, partition_area, foot] =
            Layout::vertical(heights).areas(frame.area());
        let records = count(self.now.records(), "record");
        let line = format!("{}   {records}, {:.0}/s", self.title, self.log_rate());
        frame.render_widget(Line::from(printable(&line)).bold(), head);
        if !self.now.partitions.is_empty() {
            let rows = nodes.iter().map(|(owner, (partitions, rate))| {
                row([owner.clone(), thousands(*partitions), format!("{rate:.0}")])
            });
            let widths = [Constraint::Fill(1), Constraint::Length(10), Constraint::Length(12)];
            let header = ["NODE", "PARTITIONS", "RECORDS/S"];
            frame.render_widget(table(rows, widths, header), node_area);
        }
        frame.render_widget(self.projections(), projection_area);
        frame.render_widget(self.partitions(), partition_area);
        let foot_line = match self.trouble {
            Some(trouble) => Line::from(printable(trouble)).red(),
            None => Line::from("q ends").dim(),
        };
        frame.render_widget(foot_line, foot);
    }

    fn projections(&self) -> Table<'static> {
        let rows = self.now.projections.iter().map(|seen| {
            let (applied, rebuilt) = self.projection_rates(seen);
            let rebuild = seen.rebuild.as_ref().map_or(String::new(), |rebuild| {
                format!("{}: {:.0} %, {rebuilt:.0}/s", rebuild.generation, rebuild.percent())
            });
            let parked = match seen.parked_events {
                0 => String::new(),
                events => format!("{events} of {}", seen.parked_streams),
            };
            let (state, style) = match seen.state {
                OverviewState::Running => ("running", Style::new()),
                OverviewState::Paused => ("paused", Style::new().yellow()),
                OverviewState::Rebuilding => ("rebuilding", Style::new().cyan()),
                OverviewState::Stopped => ("stopped", Style::new().red()),
            };
            let cells = [
                seen.name.clone(),
                state.to_owned(),
                seen.generation.to_string(),
                thousands(seen.lag_records),
                format!("{:.0}", seen.lag_seconds),
                format!("{applied:.0}"),
                parked,
                rebuild,
            ];
            row(cells).style(style)
        });
        let widths = [
            Constraint::Fill(1),
            Constraint::Length(11),
            Constraint::Length(4),
            Constraint::Length(12),
            Constraint::Length(8),
            Constraint::Length(10),
            Constraint::Length(12),
            Constraint::Length(20),
        ];
        let header =
            ["PROJECTION", "STATE", "GEN", "LAG", "SECONDS", "RECORDS/S", "PARKED", "REBUILD"];
        table(rows, widths, header)
    }

    fn partitions(&self) -> Table<'static> {
        let rows = self.now.partitions.iter().map(|seen| {
            let owner = seen.claim.as_ref().map_or("-".to_owned(), |(_, owner)| owner.name.clone());
            let lag = self.index_lag(seen).map_or("-".to_owned(), thousands);
            let rate = format!("{:.0}", self.partition_rate(seen));
            row([seen.partition.to_string(), owner, thousands(seen.end.0), rate, lag])
        });
        let widths = [
            Constraint::Length(10),
            Constraint::Fill(1),
            Constraint::Length(14),
            Constraint::Length(10),
            Constraint::Length(10),
        ];
        table(rows, widths, ["PARTITION", "OWNER", "END", "RECORDS/S", "INDEX LAG"])
    }
}

fn row<const N: usize>(cells: [String; N]) -> Row<'static> {
    Row::new(cells.map(|cell| printable(&cell).into_owned()))
}

fn table<const N: usize>(
    rows: impl Iterator<Item = Row<'static>>,
    widths: [Constraint; N],
    header: [&'static str; N],
) -> Table<'static> {
    Table::new(rows, widths).header(Row::new(header).dim())
}

fn draw(terminal: &mut DefaultTerminal, view: &View<'_>) -> Result<(), Error> {
    let drawn = terminal.draw(|frame| view.render(frame));
    drawn.map(drop).map_err(|error| Error::failed(format!("cannot draw: {error}")))
}

#[cfg(test)]
mod tests {
    use kafold::store::Owner;
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::*;

    fn partition(end: u64) -> PartitionView {
        let started_at = chrono::DateTime::UNIX_EPOCH;
        let owner =
            Owner { name: "node\u{202e}\u{9b}a".into(), address: String::new(), started_at };
        PartitionView {
            partition: Partition(3),
            start: Offset(0),
            end: Offset(end),
            claim: Some((1, owner)),
            newest_event_at: None,
        }
    }

    fn sample(at: Instant, end: u64) -> Sample {
        let index = BTreeMap::from([(Partition(3), Offset(900))]);
        Sample { at, partitions: vec![partition(end)], index, projections: Vec::new() }
    }

    #[test]
    #[expect(clippy::disallowed_methods, reason = "any moment will do")]
    fn a_screen_shows_who_has_what_and_how_fast_it_grows() {
        let began = Instant::now();
        let (before, now) = (sample(began, 1_000), sample(began + Duration::from_secs(2), 1_500));
        let watched = Watched { log: None, database: None, title: "kafka://here/orders".into() };
        let view = View::new(&watched, &before, &now, &None);
        let mut terminal = Terminal::new(TestBackend::new(100, 14)).expect("in memory");
        terminal.draw(|frame| view.render(frame)).expect("in memory");
        let screen = terminal.backend().to_string();
        for words in [
            "kafka://here/orders   1 500 records, 250/s",
            "node\\u202e\\u009ba (started",
            "PROJECTION",
            "600",
        ] {
            assert!(screen.contains(words), "{words:?} is not in\n{screen}");
        }
        assert_eq!(view.json()["records_per_second"], 250.0);
    }
}
