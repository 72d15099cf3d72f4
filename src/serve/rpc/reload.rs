//! Reload of files that may be replaced while the worker runs: certificates and
//! tokens.
//!
//! The contents of the files are compared, not their times: Kubernetes swaps a
//! symbolic link above the file, which changes neither the file's name nor, as
//! a rule, its time. New contents are used once two checks in a row have found
//! them, so that no half-written file is used, and no certificate with the key
//! of the one before. Contents that cannot be used change nothing.

use std::sync::Arc;
use std::time::Duration;

use sha2::{Digest as _, Sha256};
use tokio::sync::watch;

use super::tls::NotValid;
use crate::files::FlagFile;
use crate::serve::metrics::{Metrics, ReloadedFile};

/// Interval at which the files are read again: a few KiB, which cost
/// microseconds.
const INTERVAL: Duration = Duration::from_secs(1);

impl<T> std::fmt::Debug for Follower<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Follower")
            .field("sources", &self.sources)
            .finish_non_exhaustive()
    }
}

/// Value parsed from the newest usable contents of the files.
#[derive(Debug)]
pub(super) struct Latest<T>(watch::Receiver<Arc<T>>);

impl<T> Clone for Latest<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T> Latest<T> {
    pub(super) fn get(&self) -> Arc<T> {
        Arc::clone(&self.0.borrow())
    }
}

type Contents = Vec<Vec<u8>>;
type Parse<T> = dyn Fn(&[Vec<u8>]) -> anyhow::Result<T> + Send + Sync;

/// Task that reads the files at each interval and publishes changed values.
pub(super) struct Follower<T> {
    what: ReloadedFile,
    sources: Vec<FlagFile>,
    parse: Arc<Parse<T>>,
    latest: watch::Sender<Arc<T>>,
    state: Settling,
}

/// Reads `sources` and parses them with `parse`, now and at each change.
///
/// # Errors
///
/// Returns one sentence about the file that cannot be used.
pub(super) fn open<T: Send + Sync + 'static>(
    what: ReloadedFile,
    sources: Vec<FlagFile>,
    parse: impl Fn(&[Vec<u8>]) -> anyhow::Result<T> + Send + Sync + 'static,
) -> anyhow::Result<(Latest<T>, Follower<T>)> {
    let contents = read(&sources)?;
    let (latest, receiver) = watch::channel(Arc::new(parse(&contents)?));
    let follower = Follower {
        what,
        sources,
        parse: Arc::new(parse),
        latest,
        state: Settling::new(fingerprint(&contents)),
    };
    Ok((Latest(receiver), follower))
}

impl<T: Send + Sync + 'static> Follower<T> {
    /// Follows the files for as long as the future is polled; `changed` is
    /// called with each new value.
    pub(super) async fn run(mut self, metrics: Metrics, changed: impl Fn(&T) + Send) {
        let metrics = metrics.access();
        let mut interval = tokio::time::interval(INTERVAL);
        interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            interval.tick().await;
            let sources = self.sources.clone();
            // A file may be on a slow network, so it is not read on the
            // runtime's threads.
            let contents = tokio::task::spawn_blocking(move || read(&sources)).await;
            let Ok(contents) = contents else {
                // The runtime is shutting down.
                return;
            };
            let seen = contents
                .as_ref()
                .map_or(None, |contents| Some(fingerprint(contents)));
            match self.state.look(seen) {
                Look::Nothing => {}
                Look::BackAgain => metrics.reload_failed(self.what, false),
                Look::Settled => match contents.and_then(|contents| (self.parse)(&contents)) {
                    Ok(value) => {
                        changed(&value);
                        self.latest.send_replace(Arc::new(value));
                        self.state.take();
                        metrics.reloaded(self.what);
                        tracing::info!(
                            what = self.what.label(),
                            "reloaded a changed file; its new contents are in force"
                        );
                    }
                    Err(error) => {
                        metrics.reload_failed(self.what, true);
                        if self.state.tell() {
                            tracing::error!(
                                what = self.what.label(),
                                error = format!("{error:#}"),
                                "cannot use the changed file; its old contents stay in force"
                            );
                        }
                        // A certificate that has not begun will be valid later.
                        if matches!(error.downcast_ref(), Some(NotValid::NotBegun { .. })) {
                            self.state.again();
                        }
                    }
                },
            }
        }
    }
}

fn read(sources: &[FlagFile]) -> anyhow::Result<Contents> {
    sources.iter().map(FlagFile::read).collect()
}

/// Hash of the contents, so that no private key is kept only for comparison.
type Fingerprint = [u8; 32];

fn fingerprint(contents: &[Vec<u8>]) -> Fingerprint {
    let mut hash = Sha256::new();
    for content in contents {
        hash.update((content.len() as u64).to_le_bytes());
        hash.update(content);
    }
    hash.finalize().into()
}

/// Detection of changes that have settled.
#[derive(Debug)]
struct Settling {
    in_force: Fingerprint,
    /// Contents that the last check found; none if the files could not be read.
    last: Option<Fingerprint>,
    /// True if the contents of the last check were reported already.
    judged: bool,
    /// True if it was said that the contents of the last check cannot be used.
    told: bool,
}

#[derive(Debug, PartialEq, Eq)]
enum Look {
    Nothing,
    /// New contents were found twice in a row and should be tried.
    Settled,
    /// The contents in force are back, after contents that were not used.
    BackAgain,
}

impl Settling {
    fn new(in_force: Fingerprint) -> Self {
        Self {
            in_force,
            last: Some(in_force),
            judged: true,
            told: false,
        }
    }

    fn look(&mut self, seen: Option<Fingerprint>) -> Look {
        if seen != self.last {
            self.last = seen;
            self.judged = false;
            self.told = false;
            return Look::Nothing;
        }
        if std::mem::replace(&mut self.judged, true) {
            return Look::Nothing;
        }
        if seen == Some(self.in_force) {
            Look::BackAgain
        } else {
            Look::Settled
        }
    }

    /// Returns true if it was not yet said that the contents that were tried
    /// cannot be used.
    fn tell(&mut self) -> bool {
        !std::mem::replace(&mut self.told, true)
    }

    /// Notes that the contents that were tried should be tried again.
    fn again(&mut self) {
        self.judged = false;
    }

    /// Notes that the contents that were tried are in force now.
    fn take(&mut self) {
        if let Some(last) = self.last {
            self.in_force = last;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_counts_once_it_has_settled() {
        let [old, torn, new] = [[0; 32], [1; 32], [2; 32]];
        let mut state = Settling::new(old);
        assert_eq!(state.look(Some(old)), Look::Nothing);
        // The check came between the writing of the certificate and of its key.
        assert_eq!(state.look(Some(torn)), Look::Nothing);
        assert_eq!(state.look(Some(new)), Look::Nothing);
        assert_eq!(state.look(Some(new)), Look::Settled);
        state.take();
        assert_eq!(state.look(Some(new)), Look::Nothing);
    }

    #[test]
    fn what_cannot_be_used_is_told_once_and_forgotten_when_it_is_mended() {
        let [old, broken] = [[0; 32], [1; 32]];
        let mut state = Settling::new(old);
        state.look(Some(broken));
        assert_eq!(state.look(Some(broken)), Look::Settled);
        // The broken contents were not used.
        assert_eq!(state.look(Some(broken)), Look::Nothing);
        state.look(None);
        assert_eq!(state.look(None), Look::Settled);
        assert_eq!(state.look(None), Look::Nothing);
        state.look(Some(old));
        assert_eq!(state.look(Some(old)), Look::BackAgain);
        assert_eq!(state.look(Some(old)), Look::Nothing);
    }

    #[test]
    fn what_may_be_used_later_is_tried_again_and_told_once() {
        let [old, early] = [[0; 32], [1; 32]];
        let mut state = Settling::new(old);
        state.look(Some(early));
        for is_first in [true, false, false] {
            assert_eq!(state.look(Some(early)), Look::Settled);
            assert_eq!(state.tell(), is_first);
            state.again();
        }
        assert_eq!(state.look(Some(early)), Look::Settled);
        state.take();
        assert_eq!(state.look(Some(early)), Look::Nothing);
        // Told again if it comes back.
        state.look(Some(old));
        assert_eq!(state.look(Some(old)), Look::Settled);
        assert!(state.tell());
    }

    #[test]
    fn contents_are_told_apart_by_where_they_end() {
        let check = |a: &[&str], b: &[&str]| {
            let bytes = |texts: &[&str]| -> Contents {
                texts.iter().map(|text| text.as_bytes().to_vec()).collect()
            };
            assert_ne!(fingerprint(&bytes(a)), fingerprint(&bytes(b)));
        };
        check(&["ab", "c"], &["a", "bc"]);
        check(&["a"], &["a", ""]);
    }

    #[test]
    fn only_files_of_a_sensible_size_are_read() {
        let dir = tempfile::tempdir().expect("a directory");
        let source = FlagFile::new("--tls-cert", dir.path());
        let text = format!("{:#}", source.read().expect_err("a directory"));
        assert!(
            text.starts_with("--tls-cert ") && text.contains("it is not a file"),
            "{text}"
        );
        let path = dir.path().join("large");
        std::fs::write(&path, "a".repeat((1 << 20) + 1)).expect("written");
        let error = FlagFile::new("--tls-cert", &path)
            .read()
            .expect_err("large");
        assert!(error.to_string().contains("over 1048576 bytes"), "{error}");
        let error = FlagFile::new("--tls-key", &dir.path().join("none")).read();
        let text = format!("{:#}", error.expect_err("no file"));
        assert!(text.contains("cannot be read: No such file"), "{text}");
    }
}
