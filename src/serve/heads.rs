//! Linear heads in service: those of `--head`, which stay, and those of
//! `--head-dir`, which follow the files of a directory.
//!
//! A file is read when it looks the same in two checks in a row, so that no
//! half-written file is used, and again when its size, time or inode has
//! changed; Kubernetes swaps a symbolic link, which changes the inode. A name
//! that stands in the directory and is no head (a damaged file, a link whose
//! target does not exist, a pipe) leaves the head before it in service; only a
//! name that is gone takes its head with it.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use crate::files::{self, Trouble};
use crate::model::Model;
use crate::model::head::{HeadFlag, LinearHead};
use crate::serve::config::ModelConfig;
use crate::serve::metrics::{Metrics, ReloadedFile};

/// Interval at which the directory is looked at: one look asks the file system
/// for a few hundred bytes per file.
const INTERVAL: Duration = Duration::from_secs(1);
/// Ending of the files that are heads.
const ENDING: &str = ".safetensors";
/// Largest number of heads in the directory: each is listed in every answer of
/// GetModel.
const HEADS_MAX: usize = 256;
/// Largest number of entries of the directory that are looked at.
const ENTRIES_MAX: usize = 4096;
/// Largest size of the weights of all heads of the directory, in bytes. A head
/// of 1,000 classes and 512 features has 2 MB.
const WEIGHT_BYTES_MAX: usize = 1 << 30;

/// Heads that calls may name now. Clones share them.
#[derive(Debug, Clone)]
pub(crate) struct ServedHeads(watch::Receiver<Arc<[Arc<LinearHead>]>>);

impl ServedHeads {
    /// Returns the heads at this moment, those of the flags first. A call takes
    /// them once, so that it has one version of its head.
    pub(crate) fn get(&self) -> Arc<[Arc<LinearHead>]> {
        Arc::clone(&self.0.borrow())
    }
}

/// Facts that tell the contents of a file from those before, without reading
/// them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct FileStamp {
    device: u64,
    inode: u64,
    len: u64,
    changed: (i64, i64),
}

/// Entry of the directory whose name is that of a head.
#[derive(Debug, Clone, PartialEq, Eq)]
enum HeadEntry {
    /// File, or a link that leads to one.
    File(FileStamp),
    /// Anything else, with the reason why no head can be read from it.
    Unusable(String),
}

/// Heads that a worker starts with.
#[derive(Debug, Default)]
pub struct StartHeads {
    /// Heads of the flags, and those of the directory.
    pub heads: Vec<LinearHead>,
    /// Errors that were logged for names of the directory.
    told: BTreeMap<String, String>,
}

impl StartHeads {
    /// Returns the heads of the flags alone.
    #[must_use]
    pub fn new(heads: Vec<LinearHead>) -> Self {
        Self {
            heads,
            told: BTreeMap::new(),
        }
    }

    /// Adds the heads of a directory, as far as they can be used; the others
    /// are logged, and read again when they change.
    ///
    /// # Errors
    ///
    /// When the directory cannot be read, or has too many heads.
    pub fn add_dir(&mut self, dir: &Path, flags: &[HeadFlag], model: &Model) -> io::Result<()> {
        let n_fixed = self.heads.len();
        for (name, entry) in scan(dir)? {
            let total = weight_bytes(self.heads.iter().skip(n_fixed));
            match open(dir, &name, &entry, flags, model, None, total) {
                Ok(head) => self.heads.push(head),
                Err(error) => {
                    tracing::error!(error, "cannot use a head of --head-dir");
                    self.told.insert(name, error);
                }
            }
        }
        Ok(())
    }
}

/// Task that follows the directory.
#[derive(Debug)]
pub(crate) struct HeadFollower {
    dir: PathBuf,
    flags: Vec<HeadFlag>,
    model: Arc<Model>,
    /// Width of the model's features; `None` if there is none to compare with.
    width: Option<usize>,
    fixed: Vec<Arc<LinearHead>>,
    served: BTreeMap<String, Arc<LinearHead>>,
    /// Entries that were read, also in vain.
    read: BTreeMap<String, HeadEntry>,
    /// Names whose newest entry cannot be used.
    refused: BTreeSet<String>,
    /// Errors that were logged at start, for the first read of each name.
    told: BTreeMap<String, String>,
    last: Option<BTreeMap<String, HeadEntry>>,
    /// Reason for which the directory itself could not be read.
    unreadable: Option<String>,
    heads: watch::Sender<Arc<[Arc<LinearHead>]>>,
}

/// Returns the heads in service, and the task that follows the directory if
/// there is one.
pub(crate) fn serve(
    start: StartHeads,
    config: &ModelConfig,
    model: &Arc<Model>,
) -> (ServedHeads, Option<HeadFollower>) {
    let flags = &config.heads;
    let is_flag = |name: &str| flags.iter().any(|flag| flag.name == name);
    let all: Vec<Arc<LinearHead>> = start.heads.into_iter().map(Arc::new).collect();
    let (sender, receiver) = watch::channel(Arc::from(all.clone()));
    let follower = config.head_dir.as_ref().map(|dir| {
        let (fixed, of_dir): (Vec<_>, Vec<_>) =
            all.into_iter().partition(|head| is_flag(&head.name));
        HeadFollower {
            dir: dir.clone(),
            flags: flags.clone(),
            model: Arc::clone(model),
            width: None,
            fixed,
            served: of_dir
                .into_iter()
                .map(|head| (head.name.clone(), head))
                .collect(),
            read: BTreeMap::new(),
            refused: BTreeSet::new(),
            told: start.told,
            last: None,
            unreadable: None,
            heads: sender,
        }
    });
    (ServedHeads(receiver), follower)
}

impl HeadFollower {
    /// Follows the directory for as long as the future is polled. `width` is
    /// that of the features of the loaded model.
    pub(crate) async fn run(mut self, width: usize, metrics: Metrics) {
        self.width = Some(width);
        let mut interval = tokio::time::interval(INTERVAL);
        interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            interval.tick().await;
            // The directory may be on a slow network, so it is not read on the
            // runtime's threads.
            let looked = tokio::task::spawn_blocking(move || {
                let changes = self.look();
                (self, changes)
            });
            let Ok((follower, changes)) = looked.await else {
                // The runtime is shutting down.
                return;
            };
            self = follower;
            let metrics = metrics.access();
            for _ in 0..changes {
                metrics.reloaded(ReloadedFile::Heads);
            }
            let has_failed = self.unreadable.is_some() || !self.refused.is_empty();
            metrics.reload_failed(ReloadedFile::Heads, has_failed);
        }
    }

    /// Looks at the directory once; returns the number of heads that changed.
    fn look(&mut self) -> usize {
        let found = match scan(&self.dir) {
            Ok(found) => found,
            Err(error) => {
                let reason = error.to_string();
                if self.unreadable.as_ref() != Some(&reason) {
                    tracing::error!(
                        dir = %self.dir.display(),
                        error = reason,
                        "cannot read --head-dir; its heads stay in service"
                    );
                }
                self.unreadable = Some(reason);
                self.last = None;
                return 0;
            }
        };
        self.unreadable = None;
        let mut changes = 0;
        if let Some(last) = self.last.replace(found.clone()) {
            // What this check and the one before agree on.
            for (name, entry) in &found {
                if last.get(name) == Some(entry) && self.read.get(name) != Some(entry) {
                    changes += usize::from(self.take(name, entry));
                }
            }
            let gone = |name: &String| !found.contains_key(name) && !last.contains_key(name);
            changes += self.forget(gone);
        }
        if changes > 0 {
            let all = self.fixed.iter().chain(self.served.values());
            self.heads.send_replace(all.cloned().collect());
        }
        changes
    }

    /// Reads an entry; returns true if its head is new.
    fn take(&mut self, name: &str, entry: &HeadEntry) -> bool {
        self.read.insert(name.to_owned(), entry.clone());
        let told = self.told.remove(name);
        let others = self.served.iter().filter(|(other, _)| *other != name);
        let total = weight_bytes(others.map(|(_, head)| &**head));
        let opened = open(
            &self.dir,
            name,
            entry,
            &self.flags,
            &self.model,
            self.width,
            total,
        );
        match opened {
            Ok(head) => {
                self.refused.remove(name);
                let before = self.served.insert(name.to_owned(), Arc::new(head));
                let digest = self.served[name].digest.clone();
                if before.is_some_and(|before| before.digest == digest) {
                    return false;
                }
                tracing::info!(head = name, digest, "a head of --head-dir is in service");
                true
            }
            Err(error) => {
                self.refused.insert(name.to_owned());
                let kept = self.served.contains_key(name);
                // Before the first look with the width, a head may have been let
                // in that does not fit.
                let fits = self.served.get(name).is_none_or(|head| self.fits(head));
                if told.as_ref() != Some(&error) {
                    tracing::error!(
                        error,
                        "cannot use a head of --head-dir{}",
                        if kept && fits {
                            "; the one before stays in service"
                        } else {
                            ""
                        }
                    );
                }
                !fits && self.served.remove(name).is_some()
            }
        }
    }

    fn fits(&self, head: &LinearHead) -> bool {
        self.width.is_none_or(|width| head.content.width() == width)
    }

    /// Takes heads whose names are gone out of service; returns their number.
    fn forget(&mut self, gone: impl Fn(&String) -> bool) -> usize {
        self.told.retain(|name, _| !gone(name));
        self.read.retain(|name, _| !gone(name));
        self.refused.retain(|name| !gone(name));
        let before = self.served.len();
        self.served.retain(|name, _| {
            let is_gone = gone(name);
            if is_gone {
                tracing::info!(
                    head = name,
                    "a head of --head-dir is out of service: its file is gone"
                );
            }
            !is_gone
        });
        before - self.served.len()
    }
}

fn weight_bytes<'h>(heads: impl Iterator<Item = &'h LinearHead>) -> usize {
    let sizes = heads.map(|head| head.content.weight.len() * size_of::<f32>());
    sizes.sum()
}

/// Lists the heads of a directory: each entry whose name is that of a head,
/// whatever the entry is.
fn scan(dir: &Path) -> io::Result<BTreeMap<String, HeadEntry>> {
    let mut found = BTreeMap::new();
    for (idx, entry) in std::fs::read_dir(dir)?.enumerate() {
        if idx == ENTRIES_MAX {
            return Err(io::Error::other(format!(
                "the directory has more than {ENTRIES_MAX} entries"
            )));
        }
        let entry = entry?;
        let file = entry.file_name();
        let Some(name) = file.as_encoded_bytes().strip_suffix(ENDING.as_bytes()) else {
            continue;
        };
        // A dotfile may be a file that is being written.
        if name.is_empty() || name.starts_with(b".") {
            continue;
        }
        let is_text = std::str::from_utf8(name).is_ok();
        let name = files::name_as_text(name).into_owned();
        let look = if is_text {
            look(&entry.path())
        } else {
            Some(HeadEntry::Unusable("its name is not UTF-8".to_owned()))
        };
        found.extend(look.map(|entry| (name, entry)));
    }
    if found.len() > HEADS_MAX {
        return Err(io::Error::other(format!(
            "the directory has {} heads, more than {HEADS_MAX}",
            found.len()
        )));
    }
    Ok(found)
}

/// Looks at an entry of the directory, through links; `None` if the entry was
/// removed since the directory was listed.
fn look(path: &Path) -> Option<HeadEntry> {
    let trouble = match files::look(path) {
        Ok(Ok(facts)) if facts.is_file() => {
            return Some(HeadEntry::File(FileStamp {
                device: facts.dev(),
                inode: facts.ino(),
                len: facts.len(),
                changed: (facts.ctime(), facts.ctime_nsec()),
            }));
        }
        Ok(Ok(facts)) if facts.is_dir() => Trouble::Folder.to_string(),
        Ok(Ok(_)) => Trouble::Special.to_string(),
        Ok(Err(Trouble::Missing)) => return None,
        Ok(Err(trouble)) => trouble.to_string(),
        Err(error) => error.to_string(),
    };
    Some(HeadEntry::Unusable(trouble))
}

/// Reads and checks a head of the directory. `others` are the bytes of the
/// other heads' weights.
fn open(
    dir: &Path,
    name: &str,
    entry: &HeadEntry,
    flags: &[HeadFlag],
    model: &Model,
    width: Option<usize>,
    others: usize,
) -> Result<LinearHead, String> {
    let file = dir.join(format!("{name}{ENDING}"));
    let shown = file.display();
    if flags.iter().any(|flag| flag.name == name) {
        return Err(format!(
            "{shown}: the name {name} is that of a --head; rename the file"
        ));
    }
    let stamp = match entry {
        HeadEntry::File(stamp) => stamp,
        HeadEntry::Unusable(trouble) => {
            return Err(format!("{shown}: {trouble}; replace or remove it"));
        }
    };
    let size = usize::try_from(stamp.len).unwrap_or(usize::MAX);
    if others.saturating_add(size) > WEIGHT_BYTES_MAX {
        return Err(format!(
            "{shown}: with its {size} bytes the heads of the directory have more than \
             {WEIGHT_BYTES_MAX}; remove others"
        ));
    }
    let flag = HeadFlag {
        name: name.to_owned(),
        file: file.clone(),
    };
    let head = LinearHead::open(&flag).map_err(|error| error.to_string())?;
    head.check(model).map_err(|error| error.to_string())?;
    let trained = head.content.width();
    match width {
        Some(width) if trained != width => Err(format!(
            "{shown}: the head was trained on features of {trained} numbers, and those of the \
             model have {width}"
        )),
        _ => Ok(head),
    }
}
