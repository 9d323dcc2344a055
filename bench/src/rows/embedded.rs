//! R10: commands on the embedded store, against a transaction an append written by hand.

use std::sync::Arc;

use fastrand::Rng;
use kafold::clock::RandomIds;
use kafold::{CommandHandler, IdGenerator, codec, open_log};

use crate::Failure;
use crate::baselines::sqlite_log::SqliteLog;
use crate::domain::{Account, Deposit};
use crate::harness::{Bench, Goal, Sample, Size};
use crate::measure::{Until, closed_loop};
use crate::ours::deposit;
use crate::rows::read_model::on_disk;

const PAYLOAD_BYTES: usize = 256;
/// Callers, and what the ratio is to be.
const CASES: [(usize, f64); 2] = [(1, 0.9), (64, 10.0)];
/// Each caller has so many streams of its own.
const STREAMS_A_CALLER: u64 = 16;

/// At 1 caller and at many.
pub async fn run(bench: &Bench) -> Result<(), Failure> {
    let folder = tempfile::tempdir_in(on_disk()?)?;
    let url = format!("sqlite://{}", folder.path().join("ours.db").display());
    let log = open_log(&url).await?;
    let handler = CommandHandler::<Account>::new(log.store());
    let by_hand = Arc::new(SqliteLog::create(&folder.path().join("by-hand.db")).await?);
    let command = Arc::new(Deposit::of_bytes(PAYLOAD_BYTES, &mut Rng::with_seed(7)));
    let payload: Arc<[u8]> = codec::encode(&command.event())?.into();
    for (callers, least) in CASES {
        let calls = bench.size.of(100, 400, 3_000) * if callers == 1 { 1 } else { 4 };
        let goal = [("per_s", Goal::AtLeast(least)), ("p99_us", Goal::Stated)];
        let ours = async || commands(&handler, &command, callers, calls).await;
        // One at a time is as fast as many: fewer calls do.
        let few = bench.size.of(100, 400, 3_000);
        let baseline = async || appends(&by_hand, &payload, callers, few).await;
        bench.compare("R10", format!("{callers} caller(s)"), &goal, ours, baseline).await?;
    }
    log.close().await;
    if bench.size > Size::Test {
        let file = folder.path().join("with-our-table.db");
        let on_ours = Arc::new(SqliteLog::with_our_table(&file).await?);
        let calls = bench.size.of(100, 400, 3_000);
        let ours = async || appends(&on_ours, &payload, 1, calls).await;
        let baseline = async || appends(&by_hand, &payload, 1, calls).await;
        let figures = [("per_s", Goal::Stated), ("p99_us", Goal::Stated)];
        let case = "without kafold: 1 caller, by hand into kafold's table";
        bench.compare("R10", case, &figures, ours, baseline).await?;
    }
    Ok(())
}

async fn commands(
    handler: &CommandHandler<Account>,
    command: &Arc<Deposit>,
    callers: usize,
    calls: u64,
) -> Result<Sample, Failure> {
    let (handler, command) = (handler.clone(), Arc::clone(command));
    let streams = callers as u64 * STREAMS_A_CALLER;
    let measured = closed_loop(callers, Until::Calls(calls), move |number| {
        let (handler, command) = (handler.clone(), Arc::clone(&command));
        async move {
            let handled = deposit(&handler, &(number % streams).to_string(), &command).await?;
            if handled.duplicate { Err("a new command was a duplicate".into()) } else { Ok(()) }
        }
    });
    Ok(measured.await?.sample())
}

/// Each on a stream of its own: what is measured is the loop, and not who was first.
async fn appends(
    by_hand: &Arc<SqliteLog>,
    payload: &Arc<[u8]>,
    callers: usize,
    calls: u64,
) -> Result<Sample, Failure> {
    let before = by_hand.count().await?;
    let (log, payload) = (Arc::clone(by_hand), Arc::clone(payload));
    let measured = closed_loop(callers, Until::Calls(calls), move |_| {
        let (log, payload) = (Arc::clone(&log), Arc::clone(&payload));
        async move {
            let command_id = RandomIds.event_id();
            let stream = format!("account-{command_id}");
            match log.append(&stream, 0, command_id, &payload).await? {
                true => Ok(()),
                false => Err("an append of the baseline was refused".into()),
            }
        }
    });
    let sample = measured.await?.sample();
    match by_hand.count().await? - before {
        all if all == calls as i64 => Ok(sample),
        other => Err(format!("the baseline appended {other} of {calls} events").into()),
    }
}
