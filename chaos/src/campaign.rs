//! A whole campaign: servers, nodes and clients up, faults in rounds, healing and a check after each.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::builder::PossibleValuesParser;
use kafold::Clock;
use kafold::clock::SystemClock;
use kafold::projections::ReadModel;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::checker::{self, Anomaly, Verdict};
use crate::cluster::NodePlace;
use crate::disk::SmallDisk;
use crate::domain::{GroupRow, TallyRow};
use crate::faults::{Faults, KINDS};
use crate::history::{Line, RecordLine};
use crate::random::Random;
use crate::recorder::Recorder;
use crate::servers::{self, LOG, PARTITIONS, Servers};
use crate::workload::Workload;
use crate::{Failure, raw, report, shown};

const NODES: usize = 3;
/// Faults between two healings.
const ROUND: Duration = Duration::from_secs(150);
/// How long projections may take to reach the end of the log when all is mended.
const CATCH_UP_TIMEOUT: Duration = Duration::from_secs(90);
const POLL: Duration = Duration::from_millis(200);
/// Between two looks at the shared read model while things are broken.
const ROWS_INTERVAL: Duration = Duration::from_secs(3);

/// A campaign.
#[derive(Debug, clap::Args)]
pub struct RunArgs {
    /// How long things are broken.
    #[arg(long, default_value_t = 2.0, value_parser = minutes)]
    minutes: f64,
    /// What is broken, when and for how long, follows from it; default: drawn anew.
    #[arg(long)]
    seed: Option<u64>,
    /// Names of servers and of the folder in target/dev begin so.
    #[arg(long, default_value = "chaos")]
    name: String,
    /// Only these kinds of faults, such as `disk-full`; as often as wanted.
    #[arg(long, value_name = "KIND", value_parser = PossibleValuesParser::new(KINDS))]
    only: Vec<String>,
}

/// Up to a day.
fn minutes(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(minutes) if minutes > 0.0 && minutes <= 1_440.0 => Ok(minutes),
        _ => Err("write minutes above 0, such as 0.5 or 120, at most a day".to_owned()),
    }
}

/// Runs it; whether every promise was kept.
#[expect(clippy::print_stdout, reason = "the campaign's own output")]
pub async fn run(args: RunArgs) -> Result<bool, Failure> {
    let stop = Stop::new()?;
    let seed =
        args.seed.unwrap_or_else(|| kafold::IdGenerator::random(&kafold::clock::RandomIds) >> 32);
    let mut again = format!("dev/chaos --minutes {} --seed {seed}", args.minutes);
    again.extend(args.only.iter().map(|kind| format!(" --only {kind}")));
    println!("{again}");
    let root = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../target/dev"));
    let folder = root.join(format!("{}-history", args.name));
    std::fs::create_dir_all(&folder)?;
    let folder = folder.canonicalize()?;
    servers::take_down(&args.name).await?;
    let disk = SmallDisk::mount(&folder);
    if let Err(reason) = &disk {
        println!("no disk will be full: {reason}");
        // Else it would be drawn for for ever.
        if !args.only.is_empty() && args.only.iter().all(|kind| kind == "disk-full") {
            return Err(
                "--only disk-full needs what is missing above, or other kinds beside".into()
            );
        }
    }
    let disk = disk.ok();
    let ended = tokio::select! {
        biased;
        ended = campaign(&args, &folder, disk.as_ref(), seed, &stop) => ended,
        () = stop.asked(2) => Err("ended at once: nothing was checked".into()),
    };
    servers::take_down(&args.name).await?;
    drop(disk);
    let (verdict, lines) = ended?;
    report::print(&verdict, &lines);
    println!("again: {again}\nhistory: {}", folder.join("history.jsonl").display());
    Ok(verdict.anomalies.is_empty())
}

/// Counts the signals that ask it to stop: the first ends the faults, the second everything.
struct Stop(watch::Receiver<u32>);

impl Stop {
    fn new() -> std::io::Result<Self> {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let (count, counted) = watch::channel(0);
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    _ = terminate.recv() => {}
                    _ = interrupt.recv() => {}
                }
                tracing::info!("no more faults: checking; a second signal ends at once");
                count.send_modify(|count| *count += 1);
            }
        });
        Ok(Self(counted))
    }

    async fn asked(&self, times: u32) {
        // The sender lives as long as the process.
        drop(self.0.clone().wait_for(|count| *count >= times).await);
    }
}

async fn campaign(
    args: &RunArgs,
    folder: &Path,
    disk: Option<&SmallDisk>,
    seed: u64,
    stop: &Stop,
) -> Result<(Verdict, Vec<Line>), Failure> {
    let servers =
        Arc::new(Servers::start(&args.name, disk.map(|disk| disk.folder.as_path())).await?);
    let mut random = Random(seed);
    let recorder = Arc::new(Recorder::create(&folder.join("history.jsonl"))?);
    let places =
        (0..NODES).map(|number| NodePlace::new(number, &servers.log(), &servers.database, folder));
    let nodes: Arc<Vec<NodePlace>> = Arc::new(places.collect());
    for node in nodes.iter() {
        node.start()?;
    }
    for node in nodes.iter() {
        node.ready().await?;
    }
    let workload = Workload::new(Arc::clone(&nodes), Arc::clone(&recorder));
    workload.spawn(&mut random);
    let small_disk = disk.map(|disk| disk.folder.clone());
    let only = args.only.clone();
    let (all, book) = (Arc::clone(&nodes), Arc::clone(&recorder));
    let faults = Faults::new(Arc::clone(&servers), all, book, small_disk, only);
    let until = SystemClock.instant() + Duration::from_secs_f64(args.minutes * 60.0);
    loop {
        let left = until.saturating_duration_since(SystemClock.instant());
        let (looking, looked) = watch::channel(());
        let watcher = tokio::spawn(watch_rows(Arc::clone(&servers), Arc::clone(&recorder), looked));
        faults.run(ROUND.min(left), &mut random, stop.asked(1)).await?;
        drop(looking);
        watcher.await?;
        let is_last = until <= SystemClock.instant() || *stop.0.borrow() > 0;
        recorder.fault("healing", "nothing is broken");
        let begun = SystemClock.instant();
        for node in nodes.iter() {
            node.ready().await?;
        }
        let nobody_asks = workload.pause().await;
        let (verdict, records) = check(&servers, &nodes, &recorder).await?;
        let (took, found) = (SystemClock.instant() - begun, verdict.anomalies.len());
        let events = verdict.events;
        recorder.fault("healed", format!("in {took:.1?}, {events} events, anomalies: {found}"));
        if is_last || !verdict.anomalies.is_empty() {
            workload.end();
            for node in nodes.iter() {
                node.stop().await?;
            }
            drop(nobody_asks);
            for record in records {
                recorder.add(record);
            }
            recorder.flush()?;
            return Ok((verdict, recorder.lines()));
        }
    }
}

/// Looks at the shared read model now and then, until the sender is gone.
async fn watch_rows(
    servers: Arc<Servers>,
    recorder: Arc<Recorder>,
    mut looked: watch::Receiver<()>,
) {
    loop {
        tokio::select! {
            biased;
            ended = looked.changed() => if ended.is_err() { return },
            () = SystemClock.sleep(ROWS_INTERVAL) => {}
        }
        // The database may be what is broken.
        if let Ok(rows) = shown::rows(&servers.pool, GroupRow::NAME, recorder.now()).await {
            recorder.add(Line::Rows(rows));
        }
    }
}

/// Nothing is broken and nobody asks: read models reach the end of the log, and all of it is checked.
/// Also answers the log's records.
async fn check(
    servers: &Servers,
    nodes: &[NodePlace],
    recorder: &Recorder,
) -> Result<(Verdict, Vec<Line>), Failure> {
    let records = read_log(servers).await?;
    let mut stuck = Vec::new();
    for model in [TallyRow::NAME, GroupRow::NAME] {
        stuck.extend(catch_up(servers, recorder, model, &records).await?);
    }
    // Again: barriers may have come meanwhile, which the read models have passed.
    let records: Vec<_> = read_log(servers).await?.into_iter().map(Line::Record).collect();
    let mut lines = recorder.lines();
    lines.extend_from_slice(&records);
    let mut verdict = checker::check(&lines);
    verdict.anomalies.extend(stuck);
    let ended = nodes.iter().flat_map(NodePlace::ended);
    verdict.anomalies.extend(ended.map(|detail| Anomaly { name: "node-ended", detail }));
    Ok((verdict, records))
}

async fn read_log(servers: &Servers) -> Result<Vec<RecordLine>, Failure> {
    let (brokers, topic) = (servers.brokers.clone(), format!("{LOG}.events"));
    tokio::task::spawn_blocking(move || raw::read(&brokers, &topic, PARTITIONS)).await?
}

/// Waits until the read model has everything that is in the log; an anomaly if it does not get there.
async fn catch_up(
    servers: &Servers,
    recorder: &Recorder,
    model: &str,
    records: &[RecordLine],
) -> Result<Option<Anomaly>, Failure> {
    let events = records.iter().filter(|record| record.kf.is_some_and(|kf| kf.kind == 2));
    let last: BTreeMap<u32, u64> =
        events.map(|record| (record.at.partition, record.at.offset)).collect();
    let begun = SystemClock.instant();
    loop {
        let rows = shown::rows(&servers.pool, model, recorder.now()).await?;
        let next = |partition| rows.checkpoint.get(partition).copied().unwrap_or_default();
        let behind: Vec<_> =
            last.iter().filter(|(partition, last)| next(partition) <= **last).collect();
        let is_late = SystemClock.instant() - begun > CATCH_UP_TIMEOUT;
        if behind.is_empty() || is_late {
            let detail =
                format!("{model} is at {:?}, the last events at {behind:?}", rows.checkpoint);
            let stuck =
                (!behind.is_empty()).then_some(Anomaly { name: "projection-stuck", detail });
            recorder.add(Line::Rows(rows));
            return Ok(stuck);
        }
        SystemClock.sleep(POLL).await;
    }
}
