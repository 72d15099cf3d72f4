//! Bulk load that uses all capacity that the worker gives to bulk work.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::task::JoinSet;

use super::flags::BulkKind;
use super::input;
use super::load::Bench;
use crate::client::load::{CallOptions, Refusal, StreamEvent};
use crate::proto::Priority;

/// Number of streams per endpoint by default. With two, one works during the
/// round trips of the other.
const STREAMS_DEFAULT: u16 = 2;
/// Pause of a rejected caller, unless the worker says how long to wait.
const PAUSE: Duration = Duration::from_millis(10);

/// Bulk load that runs until it is dropped or ended.
pub(super) struct Bulk {
    /// Images that were answered with a result.
    pub(super) answered: Arc<AtomicU64>,
    pub(super) kind: BulkKind,
    pub(super) clients: usize,
    clients_running: JoinSet<Option<Refusal>>,
}

impl Bulk {
    pub(super) fn start(bench: &Arc<Bench>, kind: BulkKind, clients: Option<u16>) -> Self {
        let clients = match (clients, kind) {
            (Some(clients), _) => clients.into(),
            (None, BulkKind::Stream) => usize::from(STREAMS_DEFAULT) * bench.n_endpoints(),
            (None, BulkKind::Unary) => bench.callers_default(),
        };
        let answered = Arc::new(AtomicU64::new(0));
        let mut clients_running = JoinSet::new();
        for client in 0..clients {
            let (bench, answered) = (Arc::clone(bench), Arc::clone(&answered));
            clients_running.spawn(async move {
                match kind {
                    BulkKind::Stream => stream(&bench, client, &answered).await,
                    BulkKind::Unary => call(&bench, client, &answered).await,
                }
            });
        }
        Self {
            answered,
            kind,
            clients,
            clients_running,
        }
    }

    /// Ends the load. Returns the error of a client that had ended early, if
    /// any.
    pub(super) async fn end(mut self) -> Option<Refusal> {
        let mut ended = None;
        while let Some(client) = self.clients_running.try_join_next() {
            ended = ended.or(client.ok().flatten());
        }
        self.clients_running.shutdown().await;
        ended
    }
}

/// Returns true if the worker serves EmbedStream.
pub(super) async fn has_streams(bench: &Bench) -> Result<bool, Refusal> {
    match bench.lanes[0].stream(None, 1).await {
        // Dropping both ends cancels the stream.
        Ok(_) => Ok(true),
        Err(refusal) if refusal.is_unimplemented() => Ok(false),
        Err(refusal) => Err(refusal),
    }
}

async fn stream(bench: &Bench, client: usize, answered: &AtomicU64) -> Option<Refusal> {
    let lane = &bench.lanes[client % bench.lanes.len()];
    let (writer, mut reader) = match lane.stream(None, 0).await {
        Ok(ends) => ends,
        Err(refusal) => return Some(refusal),
    };
    let write = async {
        loop {
            let picture = bench.input.next();
            if !writer.send(picture.number, &picture.encoded).await {
                // The reader returns the reason.
                std::future::pending::<()>().await;
            }
        }
    };
    let read = async {
        loop {
            match reader.next().await {
                StreamEvent::Answer(_, outcome) => {
                    answered.fetch_add(u64::from(outcome.is_ok()), Ordering::Relaxed);
                }
                StreamEvent::End(refusal) => return refusal,
            }
        }
    };
    tokio::select! {
        () = write => None,
        refusal = read => refusal,
    }
}

async fn call(bench: &Bench, client: usize, answered: &AtomicU64) -> Option<Refusal> {
    let manner = CallOptions {
        priority: Some(Priority::Bulk),
        ..bench.manner()
    };
    loop {
        let pictures = bench.pictures(bench.flags.images_per_call as usize);
        match bench.call(client, manner, input::request(&pictures)).await {
            (Ok(images), _) => {
                let n_good = images.iter().filter(|image| image.is_ok()).count();
                answered.fetch_add(n_good as u64, Ordering::Relaxed);
            }
            (Err(refusal), _) if refusal.is_reject() => {
                tokio::time::sleep(refusal.retry_after.unwrap_or(PAUSE)).await;
            }
            (Err(refusal), _) => return Some(refusal),
        }
    }
}
