//! `orders import`: feeds a file of purchases to a running service, over HTTP alone.
//!
//! Every purchase is placed and paid, with command ids that follow from its line: sent twice,
//! interrupted or killed, running it again completes it and changes nothing that is there.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::sync::Arc;

use futures_util::{StreamExt, TryStreamExt, stream};
use indicatif::{ProgressBar, ProgressStyle};
use kafold::clock::{RandomIds, SystemClock};
use kafold::{Offset, Partition, Position};
use reqwest::Url;
use serde_json::json;

use client::{Client, ClientError};
use file::{FileError, Purchase, SKU};
use summary::{Comparison, Totals};

mod client;
mod file;
mod summary;

/// Most requests in flight; more than the service takes at once would only be refused.
pub(crate) const IN_FLIGHT_MAX: usize = 512;
/// Lines of progress when the output is no terminal.
const PLAIN_PROGRESS_LINES: u64 = 10;

/// What to import and where to.
#[derive(Debug, clap::Args)]
pub(crate) struct ImportArgs {
    /// Purchases, one a line: customer id, date as YYYYMMDD, number of CDs, dollars.
    ///
    /// White space between the columns; a header line and blank lines are passed over. Line N of the
    /// file, counted from 1 and with the header, becomes the order cdnow-N. The whole file is checked
    /// before anything is sent.
    file: PathBuf,
    /// The service, as it is reached over HTTP; again, or separated by commas, for more nodes of it,
    /// which are asked in turn.
    #[arg(
        long, env = "ORDERS_URL", hide_env_values = true, default_value = "http://127.0.0.1:8080", value_parser = http_url,
        value_delimiter = ','
    )]
    url: Vec<Url>,
    /// Requests in flight.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..=IN_FLIGHT_MAX as i64))]
    in_flight: u16,
}

fn http_url(text: &str) -> Result<Url, String> {
    let url: Url =
        text.parse().map_err(|error| format!("{error}; such as http://127.0.0.1:8080"))?;
    if url.scheme() != "http" || url.host().is_none() {
        return Err("only http://HOST:PORT is spoken".to_owned());
    }
    Ok(url)
}

/// Why an import did not end well.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ImportError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error(transparent)]
    Start(ClientError),
    #[error(
        "line {line}: {error}\n{done} of {all} purchases are imported; running it again is safe and \
         goes on where it stopped"
    )]
    Purchase { line: usize, error: ClientError, done: u64, all: usize },
    #[error("cannot compare with the reports: {0}; every purchase is imported")]
    Reports(ClientError),
    #[error("the reports differ from the file")]
    Differs,
    #[error("interrupted after {done} of {all} purchases; running it again is safe and goes on")]
    Interrupted { done: u64, all: usize },
}

impl ImportError {
    /// As the program ends with it.
    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            Self::Interrupted { .. } => 130,
            _ => 1,
        }
    }
}

/// Runs the import; the summary goes to standard output, progress to standard error.
pub(crate) async fn run(args: ImportArgs) -> Result<(), ImportError> {
    let purchases = file::read(&args.file)?;
    let (clock, ids) = (Arc::new(SystemClock), Arc::new(RandomIds));
    let client = Client::connect(args.url, clock, ids).await.map_err(ImportError::Start)?;
    let progress = Progress::new(purchases.len());
    let work = async {
        let positions = send(&client, &purchases, args.in_flight, &progress).await?;
        progress.finish();
        summary::compare(&client, Totals::of(&purchases), &positions)
            .await
            .map_err(ImportError::Reports)
    };
    let comparison = tokio::select! {
        biased;
        done = work => done?,
        // What is in flight is answered to nobody; sent again it is found to be there.
        _ = tokio::signal::ctrl_c() => {
            let (done, all) = (progress.done(), purchases.len());
            return Err(ImportError::Interrupted { done, all });
        }
    };
    report(&comparison)
}

fn report(comparison: &Comparison) -> Result<(), ImportError> {
    crate::say(&comparison.to_string());
    if comparison.is_equal() { Ok(()) } else { Err(ImportError::Differs) }
}

/// Places and pays every purchase, and answers the last position in each partition.
async fn send(
    client: &Client,
    purchases: &[Purchase],
    in_flight: u16,
    progress: &Progress,
) -> Result<BTreeMap<Partition, Offset>, ImportError> {
    let sent = stream::iter(purchases).map(|purchase| async move {
        match send_one(client, purchase).await {
            Ok(position) => Ok(position),
            Err(error) => {
                let (line, done, all) = (purchase.line, progress.done(), purchases.len());
                Err(ImportError::Purchase { line, error, done, all })
            }
        }
    });
    let last = BTreeMap::new();
    sent.buffer_unordered(usize::from(in_flight))
        .try_fold(last, |mut last, position: Position| async move {
            progress.one_more();
            let offset = last.entry(position.partition).or_insert(position.offset);
            *offset = position.offset.max(*offset);
            Ok(last)
        })
        .await
}

async fn send_one(client: &Client, purchase: &Purchase) -> Result<Position, ClientError> {
    let Purchase { customer, quantity, amount_cents, .. } = purchase;
    let order_id = purchase.order_id();
    let place = json!({
        "order_id": order_id,
        "customer": customer,
        "placed_at": purchase.placed_at(),
        "lines": [{"sku": SKU, "quantity": quantity, "amount_cents": amount_cents}],
    });
    client.command("orders", purchase.command_id("place"), &place).await?;
    let payment = format!("orders/{order_id}/payment");
    let pay = json!({"amount_cents": amount_cents});
    Ok(client.command(&payment, purchase.command_id("pay"), &pay).await?.position)
}

/// A bar on a terminal, some lines elsewhere.
struct Progress {
    bar: ProgressBar,
    is_plain: bool,
}

impl Progress {
    fn new(purchases: usize) -> Self {
        let is_plain = !std::io::stderr().is_terminal();
        let purchases = purchases as u64;
        let bar = if is_plain {
            // Counts and measures, and draws nothing.
            ProgressBar::with_draw_target(Some(purchases), indicatif::ProgressDrawTarget::hidden())
        } else {
            ProgressBar::new(purchases)
        };
        let template = "{bar:40} {human_pos}/{human_len} purchases, {per_sec}, {eta} left";
        bar.set_style(ProgressStyle::with_template(template).expect("the template is a constant"));
        Self { bar, is_plain }
    }

    fn done(&self) -> u64 {
        self.bar.position()
    }

    fn one_more(&self) {
        self.bar.inc(1);
        let (done, all) = (self.bar.position(), self.bar.length().unwrap_or_default());
        let step = (all / PLAIN_PROGRESS_LINES).max(1);
        if self.is_plain && (done % step == 0 || done == all) {
            let (rate, left) = (self.bar.per_sec(), self.bar.eta().as_secs());
            eprintln!("{done} of {all} purchases, {rate:.0} a second, {left} s left");
        }
    }

    fn finish(&self) {
        self.bar.finish();
    }
}
