//! Pool of many workers that does the work of jobs over datasets.
//!
//! Host names are resolved again and again, and each address that they have
//! gets a session: a task with a connection and one EmbedStream. A session
//! takes the next image from the [`TaskFeed`] whenever its worker has room. So
//! a worker that is twice as fast does twice as much, and a worker that stalls
//! takes no more images. The unanswered images of a session go back to the
//! front of the feed when its stream ends, for whatever reason. So an image is
//! with one worker at a time, and is answered once.

mod feed;
mod session;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use bytes::Bytes;
use tokio::sync::{Notify, OwnedSemaphorePermit, mpsc, watch};
use tokio::task::JoinSet;

use super::{ConnectConfig, Token};
use crate::proto::{GrpcCode, pb};

pub use self::feed::TaskFeed;

/// Addresses that all host names together may have. More would be a mistake of
/// the name service, and each address costs a connection.
const ADDRESSES_MAX: usize = 1024;
/// Capacity of the queue of answers between the sessions and the collector.
const ANSWERS_QUEUE: usize = 256;
/// Time between two attempts to find a worker while none has answered yet.
const FIRST_LOOK_INTERVAL: Duration = Duration::from_millis(300);

/// Workers of a pool, and the time limits for them.
#[derive(Debug, Clone)]
pub struct PoolConfig {
    /// Each is `http://HOST:PORT` or `https://HOST:PORT`; the host is a name or
    /// an address.
    pub endpoints: Vec<String>,
    pub connect: ConnectConfig,
    /// Images that one worker may have in flight; 0 uses the worker's own
    /// limit.
    pub window: u32,
    /// Longest time without an answer from a worker that has images; after it
    /// the worker is left out for a while.
    pub item_timeout: Duration,
    /// Time between two DNS lookups of the host names.
    pub resolve_interval: Duration,
}

impl PoolConfig {
    /// Checks the endpoints and the files of the flags, before any worker is
    /// asked.
    ///
    /// # Errors
    ///
    /// Names the endpoint or the file that cannot be used.
    pub fn check(&self) -> anyhow::Result<()> {
        self.connect.token()?;
        for url in &self.endpoints {
            self.connect.endpoint(url)?;
            host_and_port(url)?;
        }
        Ok(())
    }
}

/// Request that the workers get for each image.
#[derive(Debug, Clone, PartialEq)]
pub enum PoolWork {
    Embed(pb::EmbedStreamOptions),
    Classify(pb::ClassifyRequest),
    Score(pb::ScoreRequest),
    Tokenize(pb::TokenizeRequest),
}

/// Image that waits for its answer.
#[derive(Debug)]
pub struct PoolTask {
    /// Number that comes back with the answer; no two tasks share a number.
    pub id: u64,
    /// Bytes of the encoded file.
    pub image: Bytes,
    /// Memory that the image holds, out of the memory for images; released when
    /// the image is answered.
    pub room: OwnedSemaphorePermit,
    /// Number of times that a worker answered this image with a code that may
    /// pass.
    pub failures: u32,
    /// Number of times that a worker ended or hung while it had this image.
    pub lost: u32,
}

/// Answer of a worker for one image.
#[derive(Debug, Clone, PartialEq)]
pub enum PoolAnswer {
    /// Numbers of the vector, little-endian, in the format that the job's
    /// options name.
    Embedding(Bytes),
    Classes(Vec<pb::ClassScore>),
    Score(pb::Score),
    /// Color tokens in raster order.
    Tokens(Vec<u32>),
}

/// Reason for which an image has no answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageFault {
    /// Kind of the failure.
    pub code: GrpcCode,
    /// Sentence that describes the failure.
    pub message: String,
}

impl ImageFault {
    /// Makes the fault of an image that no worker needs to be asked about.
    #[must_use]
    pub fn invalid(message: String) -> Self {
        Self {
            code: GrpcCode::InvalidArgument,
            message,
        }
    }
}

/// Final outcome of an image.
#[derive(Debug)]
pub struct PoolOutcome {
    pub id: u64,
    pub outcome: Result<PoolAnswer, ImageFault>,
}

/// State that all sessions share.
#[derive(Debug)]
struct Shared {
    config: PoolConfig,
    token: Token,
    job: PoolWork,
    /// Digest of the model that every worker must serve.
    digest: String,
    feed: TaskFeed,
    done: mpsc::Sender<PoolOutcome>,
    /// Addresses that the host names have now.
    addresses: watch::Sender<BTreeSet<Address>>,
    /// Wakes the task that resolves host names, to do so now.
    look: Notify,
    /// True once every image has been answered.
    finished: watch::Receiver<bool>,
    /// Latest trouble with each address, for the message that explains a
    /// standstill.
    troubles: Mutex<BTreeMap<Address, String>>,
}

/// Address of an endpoint, one of those that its host name has.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Address {
    url: String,
    addr: SocketAddr,
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.url.contains(&self.addr.to_string()) {
            f.write_str(&self.url)
        } else {
            write!(f, "{} ({})", self.url, self.addr)
        }
    }
}

impl Shared {
    fn trouble(&self, address: &Address, reason: String) {
        let mut troubles = self.troubles.lock().unwrap_or_else(PoisonError::into_inner);
        troubles.insert(address.clone(), reason);
    }

    fn well(&self, address: &Address) {
        let mut troubles = self.troubles.lock().unwrap_or_else(PoisonError::into_inner);
        troubles.remove(address);
    }
}

/// Running pool of workers. Dropping the pool ends all sessions at once.
#[derive(Debug)]
pub struct WorkerPool {
    shared: Arc<Shared>,
    finish: watch::Sender<bool>,
    sessions: tokio::task::JoinHandle<()>,
}

impl WorkerPool {
    /// Starts to work on the tasks of the channel `tasks`. The answers come in
    /// the order in which they are ready.
    ///
    /// # Errors
    ///
    /// When the token cannot be read.
    pub fn start(
        config: PoolConfig,
        job: PoolWork,
        digest: String,
        tasks: mpsc::Receiver<PoolTask>,
    ) -> anyhow::Result<(Self, mpsc::Receiver<PoolOutcome>)> {
        let token = config.connect.token()?;
        let (done, answers) = mpsc::channel(ANSWERS_QUEUE);
        let (finish, finished) = watch::channel(false);
        let shared = Arc::new(Shared {
            config,
            token,
            job,
            digest,
            feed: TaskFeed::new(tasks),
            done,
            addresses: watch::channel(BTreeSet::new()).0,
            look: Notify::new(),
            finished,
            troubles: Mutex::new(BTreeMap::new()),
        });
        let sessions = tokio::spawn(keep(Arc::clone(&shared)));
        let pool = Self {
            shared,
            finish,
            sessions,
        };
        Ok((pool, answers))
    }

    /// Returns the reasons for which workers are left out, one sentence each;
    /// empty when no worker is.
    #[must_use]
    pub fn troubles(&self) -> Vec<String> {
        let troubles = &self.shared.troubles;
        let troubles = troubles.lock().unwrap_or_else(PoisonError::into_inner);
        let sentence = |(address, reason): (&Address, &String)| format!("{address}: {reason}");
        troubles.iter().map(sentence).collect()
    }

    /// True if all sessions have ended. Before [`Self::finish`] they end only
    /// when a task of the pool has panicked.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.sessions.is_finished()
    }

    /// Returns the panic that ended the sessions. To be called only on a pool
    /// that [has ended](Self::has_ended).
    pub async fn why_ended(&mut self) -> Option<anyhow::Error> {
        let error = (&mut self.sessions).await.err()?;
        let panic = error.try_into_panic().ok()?;
        let text = crate::telemetry::panic_text(&*panic);
        Some(anyhow::anyhow!("the pool of workers panicked: {text}"))
    }

    /// Closes the streams in good order, once every image has been answered.
    pub async fn finish(mut self) {
        let _ = self.finish.send(true);
        // Sessions limit by themselves how long they wait for a worker to close
        // its stream.
        let _ = (&mut self.sessions).await;
    }
}

impl Drop for WorkerPool {
    fn drop(&mut self) {
        self.sessions.abort();
    }
}

/// Asks the endpoints for their model until one of them answers.
///
/// # Errors
///
/// After `patience`, the reason for which each address has not answered.
pub async fn first_model(
    config: &PoolConfig,
    patience: Duration,
) -> anyhow::Result<pb::GetModelResponse> {
    let token = config.connect.token()?;
    let deadline = tokio::time::Instant::now() + patience;
    let mut has_told = false;
    loop {
        let mut reasons = BTreeMap::new();
        for url in &config.endpoints {
            let addresses = match resolve(url).await {
                Ok(addresses) => addresses,
                Err(error) => {
                    reasons.insert(url.clone(), format!("{error:#}"));
                    continue;
                }
            };
            for address in addresses {
                match session::model(&address, config, &token).await {
                    Ok(model) => return Ok(model),
                    Err(lost) => reasons.insert(address.to_string(), lost.reason),
                };
            }
        }
        let reasons: Vec<String> = reasons
            .into_iter()
            .map(|(at, reason)| format!("{at}: {reason}"))
            .collect();
        let (reasons, patience) = (reasons.join("; "), humantime::format_duration(patience));
        if tokio::time::Instant::now() >= deadline {
            anyhow::bail!("no worker answers after {patience} (--give-up-after); {reasons}");
        }
        if !std::mem::replace(&mut has_told, true) {
            tracing::warn!(
                reasons,
                "no worker answers yet; waiting for {patience} at most"
            );
        }
        tokio::time::sleep(FIRST_LOOK_INTERVAL).await;
    }
}

/// Keeps a session for each address that the endpoints have, until all is
/// finished.
async fn keep(shared: Arc<Shared>) {
    let mut sessions: JoinSet<Address> = JoinSet::new();
    let mut known = BTreeSet::new();
    let mut finished = shared.finished.clone();
    let mut look = tokio::time::interval(shared.config.resolve_interval);
    look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = finished.wait_for(|&finished| finished) => break,
            Some(ended) = sessions.join_next() => {
                match ended {
                    // The address has vanished; if it comes back, it gets a new
                    // session.
                    Ok(address) => {
                        shared.well(&address);
                        known.remove(&address);
                    }
                    // A session that ended without an outcome would leave its
                    // images unanswered for ever, so the job must fail with its
                    // panic.
                    Err(error) => {
                        if let Ok(panic) = error.try_into_panic() {
                            std::panic::resume_unwind(panic);
                        }
                    }
                }
                continue;
            }
            _ = look.tick() => {}
            () = shared.look.notified() => {}
        }
        let found = resolve_all(&shared).await;
        for address in &found {
            if known.len() < ADDRESSES_MAX && known.insert(address.clone()) {
                sessions.spawn(session::run(address.clone(), Arc::clone(&shared)));
            }
        }
        shared.addresses.send_replace(found);
    }
    while sessions.join_next().await.is_some() {}
}

/// Resolves all host names. A name that cannot be resolved now keeps the
/// addresses that it had.
async fn resolve_all(shared: &Shared) -> BTreeSet<Address> {
    let mut found = BTreeSet::new();
    for url in &shared.config.endpoints {
        match resolve(url).await {
            Ok(addresses) => found.extend(addresses),
            Err(error) => {
                tracing::warn!("{error:#}");
                let had = shared.addresses.borrow();
                found.extend(had.iter().filter(|address| address.url == *url).cloned());
            }
        }
    }
    found
}

async fn resolve(url: &str) -> anyhow::Result<Vec<Address>> {
    let (host, port) = host_and_port(url)?;
    let found = tokio::net::lookup_host((host.as_str(), port))
        .await
        .with_context(|| format!("--endpoint {url}: cannot resolve its host name"))?;
    let url = url.to_owned();
    Ok(found
        .map(|addr| Address {
            url: url.clone(),
            addr,
        })
        .collect())
}

fn host_and_port(url: &str) -> anyhow::Result<(String, u16)> {
    let uri: http::Uri = url
        .parse()
        .with_context(|| format!("--endpoint {url} is not a URL; write http://HOST:PORT"))?;
    let host = uri
        .host()
        .with_context(|| format!("--endpoint {url} has no host; write http://HOST:PORT"))?;
    let default = if uri.scheme_str() == Some("https") {
        443
    } else {
        80
    };
    // IPv6 addresses stand in brackets only in a URL.
    let host = host.trim_start_matches('[').trim_end_matches(']');
    Ok((host.to_owned(), uri.port_u16().unwrap_or(default)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_have_a_host_and_a_port() {
        let check = |url: &str, host: &str, port| {
            assert_eq!(host_and_port(url).unwrap(), (host.to_owned(), port));
        };
        check("http://127.0.0.1:50051", "127.0.0.1", 50051);
        check("http://[::1]:7", "::1", 7);
        check("https://workers.default.svc", "workers.default.svc", 443);
        assert!(host_and_port("/no/host").is_err());
    }
}
