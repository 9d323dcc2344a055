//! R14: from opening a log whose streams are indexed to the first answered command, with a short and a
//! long log.

use fastrand::Rng;
use kafold::CommandHandler;

use crate::Failure;
use crate::domain::{Account, Deposit};
use crate::fill::Fill;
use crate::harness::{Bench, Goal, Sample};
use crate::measure::now;
use crate::ours::{deposit, log_url};
use crate::servers::{Scratch, remove_log};

const PAYLOAD_BYTES: usize = 256;

/// The ratio is of a log three times as long over the short one.
pub async fn run(bench: &Bench) -> Result<(), Failure> {
    let streams = bench.size.of(5_000, 50_000, 1_000_000);
    let short = Indexed::make(bench, streams, streams).await?;
    let long = Indexed::make(bench, streams, 3 * streams).await?;
    let figures = [("seconds", Goal::Stated)];
    let case = format!("{streams} streams; 3 events each, over 1");
    let (of_long, of_short) =
        (async || long.first_answer().await, async || short.first_answer().await);
    bench.compare("R14", case, &figures, of_long, of_short).await?;
    short.remove().await?;
    long.remove().await
}

/// A log with its index.
struct Indexed {
    brokers: String,
    name: String,
    scratch: Scratch,
}

impl Indexed {
    async fn make(bench: &Bench, streams: u64, events: u64) -> Result<Self, Failure> {
        let brokers = bench.servers.broker().await?.to_owned();
        let (name, scratch) = (bench.servers.new_name(), bench.servers.database().await?);
        let payload_bytes = PAYLOAD_BYTES;
        let fill = Fill { brokers: &brokers, name: &name, events, streams, payload_bytes };
        fill.make(Some(&scratch.database)).await?;
        Ok(Self { brokers, name, scratch })
    }

    async fn first_answer(&self) -> Result<Sample, Failure> {
        let command = Deposit::of_bytes(PAYLOAD_BYTES, &mut Rng::with_seed(7));
        let began = now();
        let options = kafold::LogOptions::new(log_url(&self.brokers, &self.name));
        let log = options.index(&self.scratch.database).open().await?;
        let opened = now();
        let handler = CommandHandler::<Account>::new(log.store());
        // Whether its partition is owned is not waited for before, but by the command.
        let first = until_owned(&handler, &command).await?;
        let took = now() - began;
        if first.version.0 < 2 {
            return Err("the stream was not found in the index".into());
        }
        log.close().await;
        Ok(Sample::from([
            ("seconds", took.as_secs_f64()),
            ("open_seconds", (opened - began).as_secs_f64()),
        ]))
    }

    async fn remove(self) -> Result<(), Failure> {
        self.scratch.remove().await?;
        remove_log(&self.brokers, &self.name).await
    }
}

/// A partition that is not assigned yet is another node's as far as this one knows.
async fn until_owned(
    handler: &CommandHandler<Account>,
    command: &Deposit,
) -> Result<kafold::Handled, Failure> {
    crate::measure::until("the first command is answered", crate::ours::WAIT_MAX, async || {
        match deposit(handler, "0", command).await {
            Ok(handled) => Ok(Some(handled)),
            Err(failure) if is_not_owner(&failure) => Ok(None),
            Err(failure) => Err(failure),
        }
    })
    .await
}

fn is_not_owner(failure: &Failure) -> bool {
    type Handle = kafold::HandleError<std::convert::Infallible>;
    let handle = failure.downcast_ref::<Handle>();
    let not_owner = |error: &Handle| {
        matches!(error, kafold::HandleError::Append(kafold::AppendError::NotOwner { .. }))
    };
    handle.is_some_and(not_owner)
}
