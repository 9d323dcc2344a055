//! R13: bytes to the broker and on its disk, an event.

use std::path::Path;

use fastrand::Rng;
use kafold::CommandHandler;

use crate::Failure;
use crate::domain::{Account, Deposit};
use crate::harness::{Bench, Goal, Sample};
use crate::measure::{Until, closed_loop};
use crate::ours::{deposit, indexed, log_url, open};
use crate::servers::{Counted, remove_log};

const PAYLOAD_BYTES: usize = 256;
const CALLERS: usize = 1_024;
const STREAMS: u64 = 10_000;
const COMMANDS: usize = 1_024;
/// Codecs that the client is built with, and what is to be reached.
const CODECS: [(&str, f64); 3] = [("none", 2.0), ("lz4", 1.1), ("gzip", 1.1)];

/// With each codec.
pub async fn run(bench: &Bench) -> Result<(), Failure> {
    let counted = bench.servers.counted_broker().await?;
    for (codec, most) in CODECS {
        let sample = one(bench, counted, codec).await?;
        let payload = Sample::from([("wire_bytes", PAYLOAD_BYTES as f64)]);
        let payload = payload.into_iter().chain([("disk_bytes", PAYLOAD_BYTES as f64)]).collect();
        let figures = [("wire_bytes", Goal::AtMost(most)), ("disk_bytes", Goal::AtMost(most))];
        bench.keep("R13", format!("256 B, {codec}"), &figures, vec![sample], vec![payload]);
    }
    Ok(())
}

async fn one(bench: &Bench, counted: &Counted, codec: &str) -> Result<Sample, Failure> {
    let events = bench.size.of(5_000, 40_000, 400_000);
    let name = bench.servers.new_name();
    let scratch = bench.servers.database().await?;
    let url = log_url(&counted.brokers, &name);
    let url = format!("{url}&librdkafka.compression.codec={codec}");
    let log = open(&url, &scratch.database).await?;
    let handler = CommandHandler::<Account>::new(log.store());
    let mut random = Rng::with_seed(7);
    let commands: Vec<_> =
        (0..COMMANDS).map(|_| Deposit::of_bytes(PAYLOAD_BYTES, &mut random)).collect();
    let commands = std::sync::Arc::new(commands);
    let call = move |number: u64| {
        let (handler, commands) = (handler.clone(), std::sync::Arc::clone(&commands));
        async move {
            let command = &commands[number as usize % COMMANDS];
            deposit(&handler, &(number % STREAMS).to_string(), command).await.map(drop)
        }
    };
    // Streams are known from here on: what follows is appends alone, and signs of life.
    closed_loop(CALLERS, Until::Calls(STREAMS), call.clone()).await?;
    let before = (counted.proxy.upstream_bytes(), disk_bytes(&counted.data, &name)?);
    closed_loop(CALLERS, Until::Calls(events), call).await?;
    let after = (counted.proxy.upstream_bytes(), disk_bytes(&counted.data, &name)?);
    let per_event = |before: u64, after: u64| (after - before) as f64 / events as f64;
    log.close().await;
    let offsets = indexed(&scratch.database).await?;
    if offsets < STREAMS + events {
        return Err(format!("{events} events were acknowledged, {offsets} are there").into());
    }
    scratch.remove().await?;
    remove_log(&counted.brokers, &name).await?;
    Ok(Sample::from([
        ("wire_bytes", per_event(before.0, after.0)),
        ("disk_bytes", per_event(before.1, after.1)),
    ]))
}

/// Bytes of the segments of the events topic.
fn disk_bytes(data: &Path, log: &str) -> Result<u64, Failure> {
    let prefix = format!("{log}.events-");
    let mut bytes = 0;
    for folder in std::fs::read_dir(data)? {
        let folder = folder?;
        if !folder.file_name().to_string_lossy().starts_with(&prefix) {
            continue;
        }
        for file in std::fs::read_dir(folder.path())? {
            let file = file?;
            // Indexes beside the segments are allocated beforehand; they are a hundredth at most.
            if file.path().extension().is_some_and(|extension| extension == "log") {
                bytes += file.metadata()?.len();
            }
        }
    }
    if bytes == 0 {
        return Err(format!("{} has no segments of {log}", data.display()).into());
    }
    Ok(bytes)
}
