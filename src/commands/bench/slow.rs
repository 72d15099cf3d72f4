//! Mode slow-reader: callers beside clients that open streams and stop reading.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::task::JoinSet;

use super::flags::SlowReaderArgs;
use super::load::Bench;
use super::modes::{ModeFindings, Phases, has_streams, saturation};
use super::process;
use super::progress::note;
use super::report::milliseconds;
use crate::client::load::{LoadConnection, StreamEvent, StreamReader, StreamWriter};

/// Window of a stream: bytes of answers that a connection accepts before the
/// client reads. The smallest window that HTTP/2 clients usually open, so that
/// the worker soon cannot send more.
const STREAM_WINDOW: u32 = 65_535;

pub(super) async fn run(
    bench: &Arc<Bench>,
    args: &SlowReaderArgs,
    phases: &mut Phases,
) -> anyhow::Result<ModeFindings> {
    let mut findings = ModeFindings::default();
    if !has_streams(bench).await? {
        let text = "skipped: the worker does not serve EmbedStream (UNIMPLEMENTED)";
        note(text);
        findings.line(text.to_owned());
        findings.number("skipped", text);
        return Ok(findings);
    }
    let images_per_second = match args.rate {
        Some(rate) => rate,
        None => saturation(bench, "saturation", phases).await * args.of_saturation / 100.0,
    };
    if bench.is_over(phases) || images_per_second <= 0.0 {
        return Ok(findings);
    }
    let priority = bench.flags.priority;
    let alone = bench
        .open("callers alone", images_per_second, priority, None)
        .await;
    phases.push(alone.clone());
    if bench.is_over(phases) {
        return Ok(findings);
    }
    let rss_before = process::usage(&bench.flags.pids).map(|usage| usage.rss_kib);
    let mut stalled = JoinSet::new();
    let accepted = Arc::new(AtomicU64::new(0));
    let mut readers = Vec::new();
    for idx in 0..usize::from(args.readers) {
        let endpoint = &bench.flags.endpoints[idx % bench.n_endpoints()];
        let lane =
            LoadConnection::connect(endpoint, &bench.flags.connect, Some(STREAM_WINDOW)).await?;
        let (writer, reader) = lane
            .stream(None, 0)
            .await
            .map_err(|refusal| anyhow::anyhow!("a stream cannot be opened: {refusal}"))?;
        readers.push(reader);
        let (bench, accepted) = (Arc::clone(bench), Arc::clone(&accepted));
        stalled.spawn(async move { write(&bench, &writer, &accepted).await });
    }
    let name = format!("callers beside {} that do not read", args.readers);
    let beside = bench.open(&name, images_per_second, priority, None).await;
    phases.push(beside.clone());
    let rss_stalled = process::usage(&bench.flags.pids).map(|usage| usage.rss_kib);
    let accepted_stalled = accepted.load(Ordering::Relaxed);
    // Nothing more is sent; the answers of the items in the streams are read
    // now.
    stalled.shutdown().await;
    let (answered, ended_badly) = read_all(bench, readers).await;
    let accepted = accepted.load(Ordering::Relaxed);

    findings.number("readers", args.readers);
    findings.number("items_taken_while_stalled", accepted_stalled);
    findings.number("items_answered_in_the_end", answered);
    findings.number("p99_alone_ms", alone.counts.p99_ms());
    findings.number("p99_beside_ms", beside.counts.p99_ms());
    findings.number("rss_kib_before", rss_before);
    findings.number("rss_kib_while_stalled", rss_stalled);
    if let Some((alone, beside)) = alone.counts.p99_ms().zip(beside.counts.p99_ms()) {
        findings.line(format!(
            "p99 of the callers: {} alone, {} beside {} streams that nobody read",
            milliseconds(alone),
            milliseconds(beside),
            args.readers
        ));
    }
    findings.line(format!(
        "the streams accepted {accepted_stalled} items and then no more; {answered} of {accepted} \
         were answered once the streams were read"
    ));
    if let Some((before, stalled)) = rss_before.zip(rss_stalled) {
        findings.line(format!(
            "memory of the worker: {before} KiB before, {stalled} KiB while the streams stalled"
        ));
    }
    if let Some(reason) = ended_badly {
        findings
            .broken
            .push(format!("a stream that was read late ended badly: {reason}"));
    }
    if answered != accepted && !bench.is_stopped() {
        let text = format!("the streams accepted {accepted} items and answered {answered}");
        findings.broken.push(text);
    }
    Ok(findings)
}

async fn write(bench: &Bench, writer: &StreamWriter, accepted: &AtomicU64) {
    loop {
        let picture = bench.input.next();
        if !writer.send(picture.number, &picture.encoded).await {
            return;
        }
        accepted.fetch_add(1, Ordering::Relaxed);
    }
}

/// Reads answers until each stream ends; returns their number and the error of
/// the first stream that ended badly.
async fn read_all(bench: &Bench, readers: Vec<StreamReader>) -> (u64, Option<String>) {
    let mut reading = JoinSet::new();
    for mut reader in readers {
        reading.spawn(async move {
            let mut answered = 0;
            loop {
                match reader.next().await {
                    StreamEvent::Answer(..) => answered += 1,
                    StreamEvent::End(refusal) => return (answered, refusal),
                }
            }
        });
    }
    let (mut answered, mut ended_badly) = (0, None);
    let all = async {
        while let Some(one) = reading.join_next().await {
            if let Ok((n, refusal)) = one {
                answered += n;
                ended_badly = ended_badly
                    .take()
                    .or(refusal.map(|refusal| refusal.to_string()));
            }
        }
    };
    let in_time = tokio::time::timeout(bench.flags.timeout, all).await.is_ok();
    if !in_time {
        ended_badly = Some(format!(
            "no end within {:?} (--timeout)",
            bench.flags.timeout
        ));
    }
    (answered, ended_badly)
}
