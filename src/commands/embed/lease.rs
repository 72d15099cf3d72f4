//! Lease of a share: a file beside the journal that says which process works on
//! the share. Two processes for one share would write the same files, and if a
//! server answers one of them otherwise than the other, rows may be there twice
//! or be missing.
//!
//! The owner rewrites the file at each interval while it works, and removes it
//! at its end. A file of an owner that is gone is taken over: at once if the
//! owner ran on this machine, otherwise once the file has not changed for
//! several intervals. Only changes count, since the clocks of two machines may
//! differ. A file changes only from a content that its writer has read, so one
//! of two processes that take a lease over gets it, and an owner that was taken
//! for gone notices and ends.

mod owner;

use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use self::owner::{LeaseOwner, LiveLease};
use super::flags::JobShare;
use super::sink::{FileVersion, Sink};

/// Directory of the leases, one file per share.
const LEASES: &str = "_imagegpt/leases";
/// Times that a lease is tried for while others take or remove it.
const TRIES: usize = 8;

/// Times of a lease.
#[derive(Debug, Clone, Copy)]
pub(super) struct LeaseTimes {
    /// Interval at which the owner rewrites the file: one small write or request.
    renew: Duration,
    /// Time without a change after which the owner is taken for gone; several
    /// intervals, so that a store that is slow for a while costs nobody a lease.
    gone: Duration,
    /// Interval at which a process that waits looks at the file.
    look: Duration,
}

impl Default for LeaseTimes {
    fn default() -> Self {
        Self {
            renew: Duration::from_secs(10),
            gone: Duration::from_secs(45),
            look: Duration::from_secs(1),
        }
    }
}

/// Content of a lease.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct LeaseNote {
    index: u32,
    of: u32,
    owner: LeaseOwner,
    /// Time of the last change by the owner's clock, for people.
    renewed: String,
    /// Number of renewals, so that each content differs from the one before.
    renewals: u64,
}

impl LeaseNote {
    fn renew(&mut self) {
        self.renewals += 1;
        self.renewed = now();
    }

    fn bytes(&self) -> anyhow::Result<Bytes> {
        let mut text = serde_json::to_string_pretty(self)?;
        text.push('\n');
        Ok(text.into())
    }
}

fn now() -> String {
    humantime::format_rfc3339_seconds(SystemTime::now()).to_string()
}

/// Error of a share on which another process works.
#[derive(Debug, thiserror::Error)]
#[error(
    "--output {output}: share {index}/{of} is being worked on by process {} on {} (its lease was \
     renewed at {renewed}); wait until that process ends, or end it, and repeat the command",
    owner.pid, owner.host
)]
pub(super) struct ShareTaken {
    output: String,
    index: u32,
    of: u32,
    owner: LeaseOwner,
    renewed: String,
}

/// Error of a process whose lease another process has taken over.
#[derive(Debug, thiserror::Error)]
#[error(
    "{at} is no longer this process's: it was removed, or another process took it over because it \
     was not renewed in time; the same command resumes the job once no other process works on the \
     share"
)]
struct LeaseLost {
    at: String,
}

/// Lease that this process holds until it is released or dropped.
#[derive(Debug)]
pub(super) struct ShareLease {
    /// Dropping the sender ends the task, which removes the file.
    end: oneshot::Sender<()>,
    /// Receiver of the reason for which the lease was lost.
    lost: oneshot::Receiver<anyhow::Error>,
    task: JoinHandle<()>,
}

impl ShareLease {
    /// Takes the lease of a share.
    ///
    /// # Errors
    ///
    /// [`ShareTaken`] when another process works on the share, or on one that
    /// has files in common with it.
    pub(super) async fn take(
        sink: &Sink,
        share: JobShare,
        times: LeaseTimes,
    ) -> anyhow::Result<Self> {
        let name = file_name(share);
        let mut note = LeaseNote {
            index: share.index,
            of: share.of,
            owner: LeaseOwner::new(),
            renewed: now(),
            renewals: 0,
        };
        let live = LiveLease::new(&note.owner);
        for _ in 0..TRIES {
            let before = Found::overlapping(sink, share).await?;
            let mut old = None;
            for found in before {
                let found = found.when_gone(sink, times).await?;
                if found.name == name {
                    old = Some(found.version);
                } else {
                    sink.remove(&found.name).await?;
                }
            }
            note.renew();
            let content = note.bytes()?;
            let version = match old {
                Some(old) => sink.replace(&name, &old, content).await?,
                None if sink.create(&name, content.clone()).await? => {
                    let there = sink.read_version(&name).await?;
                    there.filter(|there| there.content == content)
                }
                None => None,
            };
            let Some(version) = version else {
                // Another process was faster; look at what it wrote.
                continue;
            };
            let held = HeldLease {
                sink: sink.clone(),
                name: name.clone(),
                note,
                version,
                _live: live,
            };
            // Another process may have taken a share meanwhile that has files in
            // common with this one, under another name.
            let others = Found::overlapping(sink, share).await;
            let other = others.map(|others| others.into_iter().find(|other| other.name != name));
            return match other {
                Ok(None) => Ok(held.keep(times)),
                Ok(Some(other)) => {
                    held.remove().await;
                    Err(other.taken(sink).into())
                }
                Err(error) => {
                    held.remove().await;
                    Err(error)
                }
            };
        }
        anyhow::bail!("{sink}/{name} keeps changing: several processes begin to work on the share")
    }

    /// Fails at once if a process that is known to live works on the share of an
    /// output on a disk. A bucket is asked only once, by [`Self::take`]: one that
    /// does not answer is waited for long enough.
    ///
    /// # Errors
    ///
    /// [`ShareTaken`].
    pub(super) async fn check(sink: &Sink, share: JobShare) -> anyhow::Result<()> {
        if !sink.is_local() {
            return Ok(());
        }
        let found = Found::overlapping(sink, share).await?;
        match found
            .into_iter()
            .find(|found| found.is_alive() == Some(true))
        {
            None => Ok(()),
            Some(found) => Err(found.taken(sink).into()),
        }
    }

    /// Waits until the lease is lost, and returns the reason; never returns
    /// otherwise.
    pub(super) async fn lost(&mut self) -> anyhow::Error {
        match (&mut self.lost).await {
            Ok(error) => error,
            Err(_) => std::future::pending().await,
        }
    }

    /// Gives the lease up, and removes its file.
    pub(super) async fn release(self) {
        drop(self.end);
        // A task that panicked leaves a file that the next process takes over.
        let _ = self.task.await;
    }
}

fn file_name(share: JobShare) -> String {
    format!("{LEASES}/{:05}-of-{:05}.json", share.index, share.of)
}

/// Returns true if two shares have files in common, whatever the number of
/// files.
fn overlap(one: JobShare, other: JobShare) -> bool {
    let (mut divisor, mut rest) = (one.of, other.of);
    while rest != 0 {
        (divisor, rest) = (rest, divisor % rest);
    }
    one.index % divisor == other.index % divisor
}

/// Reads a share from the name of its lease.
fn share_of(name: &str) -> Option<JobShare> {
    let (index, of) = name.strip_suffix(".json")?.split_once("-of-")?;
    let (index, of) = (index.parse().ok()?, of.parse().ok()?);
    (index < of).then_some(JobShare { index, of })
}

/// Lease that was found in an output.
#[derive(Debug)]
struct Found {
    name: String,
    share: JobShare,
    version: FileVersion,
    /// Content; none if it is not a lease of this version of the program.
    note: Option<LeaseNote>,
}

impl Found {
    /// Finds the leases of shares that have files in common with `share`.
    async fn overlapping(sink: &Sink, share: JobShare) -> anyhow::Result<Vec<Self>> {
        let mut leases = Vec::new();
        for (name, _) in sink.list(LEASES).await? {
            let other = share_of(&name).filter(|other| overlap(share, *other));
            if let Some(other) = other {
                leases.extend(Self::read(sink, format!("{LEASES}/{name}"), other).await?);
            }
        }
        Ok(leases)
    }

    async fn read(sink: &Sink, name: String, share: JobShare) -> anyhow::Result<Option<Self>> {
        let Some(version) = sink.read_version(&name).await? else {
            return Ok(None);
        };
        Ok(Some(Self {
            note: serde_json::from_slice(&version.content).ok(),
            name,
            share,
            version,
        }))
    }

    /// Returns whether the owner lives; `None` if this machine cannot tell.
    fn is_alive(&self) -> Option<bool> {
        self.note.as_ref()?.owner.is_alive()
    }

    /// Waits until the owner is known to be gone.
    async fn when_gone(self, sink: &Sink, times: LeaseTimes) -> anyhow::Result<Self> {
        match self.is_alive() {
            Some(true) => return Err(self.taken(sink).into()),
            Some(false) => return Ok(self),
            None => {}
        }
        let share = self.share;
        tracing::warn!(
            lease = self.name,
            owner = self.note.as_ref().map(|note| note.owner.to_string()),
            "share {}/{} has a lease of another process; waiting up to {} to see whether that \
             process lives",
            share.index,
            share.of,
            humantime::format_duration(times.gone)
        );
        let until = tokio::time::Instant::now() + times.gone;
        loop {
            tokio::time::sleep(times.look).await;
            let now = Self::read(sink, self.name.clone(), share).await?;
            match now {
                // The owner has ended; the file is created anew.
                None => return Ok(self),
                Some(now) if now.version.content != self.version.content => {
                    return Err(now.taken(sink).into());
                }
                Some(_) if tokio::time::Instant::now() >= until => return Ok(self),
                Some(_) => {}
            }
        }
    }

    fn taken(&self, sink: &Sink) -> ShareTaken {
        let unknown = || (LeaseOwner::unknown(), "an unknown time".to_owned());
        let note = self.note.clone();
        let (owner, renewed) = note.map_or_else(unknown, |note| (note.owner, note.renewed));
        ShareTaken {
            output: sink.to_string(),
            index: self.share.index,
            of: self.share.of,
            owner,
            renewed,
        }
    }
}

/// Lease that this process holds.
#[derive(Debug)]
struct HeldLease {
    sink: Sink,
    name: String,
    note: LeaseNote,
    version: FileVersion,
    _live: LiveLease,
}

impl HeldLease {
    /// Renews the lease in a task of its own.
    fn keep(self, times: LeaseTimes) -> ShareLease {
        let (end, ended) = oneshot::channel();
        let (tell, lost) = oneshot::channel();
        let task = tokio::spawn(self.renew_until(times, ended, tell));
        ShareLease { end, lost, task }
    }

    async fn renew_until(
        mut self,
        times: LeaseTimes,
        mut ended: oneshot::Receiver<()>,
        tell: oneshot::Sender<anyhow::Error>,
    ) {
        loop {
            tokio::select! {
                // Resolves when the sender is dropped, too.
                _ = &mut ended => break,
                () = tokio::time::sleep(times.renew) => {}
            }
            match self.renew().await {
                Ok(true) => {}
                Ok(false) => {
                    let at = format!("{}/{}", self.sink, self.name);
                    // Nobody listens once the job has ended.
                    let _ = tell.send(LeaseLost { at }.into());
                    return;
                }
                // A store or a disk that fails for a while; if it fails for
                // long, another process takes the lease over, which shows.
                Err(error) => tracing::warn!("cannot renew the lease: {error:#}"),
            }
        }
        self.remove().await;
    }

    /// Rewrites the file; returns false if it is no longer this process's.
    async fn renew(&mut self) -> anyhow::Result<bool> {
        self.note.renew();
        let content = self.note.bytes()?;
        let renewed = self
            .sink
            .replace(&self.name, &self.version, content)
            .await?;
        if let Some(version) = renewed {
            self.version = version;
            return Ok(true);
        }
        // A write whose answer was lost has changed the file, too.
        match self.mine().await? {
            Some(there) => {
                self.version = there;
                Ok(true)
            }
            None => Ok(false),
        }
    }

    /// Reads the file; `None` if it is no longer this process's.
    async fn mine(&self) -> anyhow::Result<Option<FileVersion>> {
        let there = self.sink.read_version(&self.name).await?;
        Ok(there.filter(|there| {
            let note = serde_json::from_slice::<LeaseNote>(&there.content);
            note.is_ok_and(|note| note.owner == self.note.owner)
        }))
    }

    /// Removes the file if it is still this process's. Writes nothing, since the
    /// disk may be full.
    async fn remove(self) {
        let removed = async {
            if self.mine().await?.is_some() {
                self.sink.remove(&self.name).await?;
            }
            anyhow::Ok(())
        };
        if let Err(error) = removed.await.context("cannot remove the lease") {
            tracing::warn!("{error:#}; the next process waits until it is stale");
        }
    }
}

#[cfg(test)]
mod tests;
