//! Many workers as one, for jobs over datasets.
//!
//! Names are resolved again and again, and each address that they have gets a
//! session: a task with a connection and one EmbedStream. A session takes the
//! next image from the [`TaskFeed`] whenever its worker has room, so a worker that
//! is twice as fast does twice as much, and one that stalls takes no more. What
//! a session has when its stream ends, however it ends, goes back to the front
//! of the feed. So an image is with one worker at a time, and is answered once.

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

/// Addresses that all names together may have: more would be a mistake of the
/// name service, and each costs a connection.
const ADDRESSES_MAX: usize = 1024;
/// Answers on their way to whoever collects them.
const ANSWERS_QUEUE: usize = 256;
/// Rest between two looks for a worker while none has answered yet.
const FIRST_LOOK_INTERVAL: Duration = Duration::from_millis(300);

/// Which workers, and how patient to be with them.
#[derive(Debug, Clone)]
pub struct PoolConfig {
    /// `http://HOST:PORT` or `https://HOST:PORT`, each a name or an address.
    pub endpoints: Vec<String>,
    pub connect: ConnectConfig,
    /// Images that one worker may have at once; 0 is what it allows.
    pub window: u32,
    /// A worker that has answered nothing for so long is left out.
    pub item_timeout: Duration,
    /// How often names are resolved again.
    pub resolve_interval: Duration,
}

impl PoolConfig {
    /// # Errors
    ///
    /// What is wrong with the endpoints and the files, before any is asked.
    pub fn check(&self) -> anyhow::Result<()> {
        self.connect.token()?;
        for url in &self.endpoints {
            self.connect.endpoint(url)?;
            host_and_port(url)?;
        }
        Ok(())
    }
}

/// What is asked of the workers about each image.
#[derive(Debug, Clone, PartialEq)]
pub enum PoolWork {
    Embed(pb::EmbedStreamOptions),
    Classify(pb::ClassifyRequest),
    Score(pb::ScoreRequest),
}

/// An image that waits for its answer.
#[derive(Debug)]
pub struct PoolTask {
    /// Comes back with the answer; no two tasks share one.
    pub id: u64,
    /// The encoded file.
    pub image: Bytes,
    /// Its part of the memory that images may take; free when it is answered.
    pub room: OwnedSemaphorePermit,
    /// How often a worker has failed at it with a code that may pass.
    pub failures: u32,
    /// How often a worker has ended, or hung, that had it.
    pub lost: u32,
}

/// What a worker said of an image.
#[derive(Debug, Clone, PartialEq)]
pub enum PoolAnswer {
    /// The numbers, little-endian, as the job's options ask for them.
    Embedding(Bytes),
    Classes(Vec<pb::ClassScore>),
    Score(pb::Score),
}

/// Why an image has no answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageFault {
    /// What kind of failure it is.
    pub code: GrpcCode,
    /// One sentence.
    pub message: String,
}

impl ImageFault {
    /// An image that no worker has to be asked about.
    #[must_use]
    pub fn invalid(message: String) -> Self {
        Self {
            code: GrpcCode::InvalidArgument,
            message,
        }
    }
}

/// An image's end.
#[derive(Debug)]
pub struct PoolOutcome {
    pub id: u64,
    pub outcome: Result<PoolAnswer, ImageFault>,
}

/// What all sessions share.
#[derive(Debug)]
struct Shared {
    config: PoolConfig,
    token: Token,
    job: PoolWork,
    /// What every worker must serve.
    digest: String,
    feed: TaskFeed,
    done: mpsc::Sender<PoolOutcome>,
    /// The addresses that the names have now.
    addresses: watch::Sender<BTreeSet<Address>>,
    /// Asks for the names to be resolved now.
    look: Notify,
    /// True once everything has been answered.
    finished: watch::Receiver<bool>,
    /// The last trouble with each address, for whoever asks why nothing moves.
    troubles: Mutex<BTreeMap<Address, String>>,
}

/// One of the addresses of an endpoint.
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

/// The workers at work. Dropping it ends all sessions at once.
#[derive(Debug)]
pub struct WorkerPool {
    shared: Arc<Shared>,
    finish: watch::Sender<bool>,
    sessions: tokio::task::JoinHandle<()>,
}

impl WorkerPool {
    /// Starts on whatever comes out of `tasks`. The answers come in the order
    /// in which they are there.
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

    /// Why workers are left out, one sentence each; empty when all are well.
    #[must_use]
    pub fn troubles(&self) -> Vec<String> {
        let troubles = &self.shared.troubles;
        let troubles = troubles.lock().unwrap_or_else(PoisonError::into_inner);
        let sentence = |(address, reason): (&Address, &String)| format!("{address}: {reason}");
        troubles.iter().map(sentence).collect()
    }

    /// True if all sessions are gone, which they never are of themselves before
    /// [`Self::finish`]: something in them has panicked.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.sessions.is_finished()
    }

    /// The panic that ended the sessions; only of a pool that
    /// [has ended](Self::has_ended).
    pub async fn why_ended(&mut self) -> Option<anyhow::Error> {
        let error = (&mut self.sessions).await.err()?;
        let panic = error.try_into_panic().ok()?;
        let text = crate::telemetry::panic_text(&*panic);
        Some(anyhow::anyhow!("the pool of workers panicked: {text}"))
    }

    /// Ends the streams in good order, once everything has been answered.
    pub async fn finish(mut self) {
        let _ = self.finish.send(true);
        // Sessions bound by themselves how long they wait for a worker's end.
        let _ = (&mut self.sessions).await;
    }
}

impl Drop for WorkerPool {
    fn drop(&mut self) {
        self.sessions.abort();
    }
}

/// Asks the endpoints what they serve until one answers.
///
/// # Errors
///
/// After `patience`, why none has answered.
pub async fn first_model(
    config: &PoolConfig,
    patience: Duration,
) -> anyhow::Result<pb::GetModelResponse> {
    let token = config.connect.token()?;
    let deadline = tokio::time::Instant::now() + patience;
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
        if tokio::time::Instant::now() >= deadline {
            let reasons: Vec<String> = reasons
                .into_iter()
                .map(|(at, reason)| format!("{at}: {reason}"))
                .collect();
            anyhow::bail!("no worker answers; {}", reasons.join("; "));
        }
        tokio::time::sleep(FIRST_LOOK_INTERVAL).await;
    }
}

/// Keeps a session for each address that the endpoints have.
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
                    // Its address is gone; should it come back, it is new.
                    Ok(address) => {
                        shared.well(&address);
                        known.remove(&address);
                    }
                    // A session without its end would leave its images unasked
                    // for ever: the job is to fail of it.
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

/// A name that cannot be resolved now keeps the addresses that it had.
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
        .with_context(|| format!("--endpoint {url}: its name cannot be resolved"))?;
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
        .with_context(|| format!("--endpoint {url} is not a URL"))?;
    let host = uri
        .host()
        .with_context(|| format!("--endpoint {url} has no host; write http://HOST:PORT"))?;
    let default = if uri.scheme_str() == Some("https") {
        443
    } else {
        80
    };
    // Addresses of IPv6 stand in brackets in a URL only.
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
