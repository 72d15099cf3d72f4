//! Files of a commit in the cache, laid out as `huggingface_hub` does: content
//! below `blobs`, and links to it below `snapshots`.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::wire::{BlobFacts, HubModel, HubTrouble, HubWire};
use crate::compile::error::CompileError;
use crate::compile::{CompileProgress, CompileStep};

/// Number of times that an interrupted download is resumed without much
/// progress.
const N_RETRIES: u32 = 3;
/// Bytes of progress after which interruptions are counted anew.
const PROGRESS_BYTES: u64 = 1 << 20;
/// Rest before the first retry; the rests after it are longer by as much.
const REST: Duration = Duration::from_millis(300);
/// Rest between two looks at a file that another process downloads.
const LOOK_INTERVAL: Duration = Duration::from_millis(200);
/// Bytes that are read and written at once.
const CHUNK: usize = 64 << 10;

/// Download of the files of one commit.
pub(super) struct SnapshotDownload<'a> {
    pub(super) wire: &'a HubWire,
    pub(super) at: HubModel<'a>,
    pub(super) commit: &'a str,
    /// Directory of the commit's files.
    pub(super) folder: PathBuf,
    /// Longest pause of another process that downloads the same file.
    pub(super) pause: Duration,
    pub(super) progress: &'a mut dyn CompileProgress,
}

impl SnapshotDownload<'_> {
    /// Returns the path of a file, which is downloaded if the cache does not
    /// have it. `name` is the name of a file at the top of the repository.
    pub(super) fn file(&mut self, name: &str) -> Result<PathBuf, HubTrouble> {
        let path = self.folder.join(name);
        if path.is_file() {
            return Ok(path);
        }
        let url = self.wire.file_url(self.at, self.commit, name);
        let facts = self.wire.facts(self.at, &url, name)?;
        let blobs = self.folder.parent().and_then(Path::parent);
        let blobs = blobs.unwrap_or(&self.folder).join("blobs");
        for folder in [&self.folder, &blobs] {
            std::fs::create_dir_all(folder).map_err(|error| CompileError::write(folder, &error))?;
        }
        let blob = blobs.join(&facts.name);
        let part = blobs.join(format!("{}.part", facts.name));
        // The lock ends with the file.
        let lock = self.lock(&blobs.join(format!("{}.lock", facts.name)), &part, name)?;
        let is_there = std::fs::metadata(&blob).is_ok_and(|blob| blob.len() == facts.bytes);
        if !is_there {
            self.fill(&part, &url, name, &facts)?;
            std::fs::rename(&part, &blob).map_err(|error| CompileError::write(&blob, &error))?;
        }
        drop(lock);
        let target = Path::new("../../blobs").join(&facts.name);
        match std::os::unix::fs::symlink(target, &path) {
            Ok(()) => Ok(path),
            // Another process was here first.
            Err(_) if path.is_file() => Ok(path),
            Err(error) => Err(CompileError::write(&path, &error).into()),
        }
    }

    /// Waits until no other process downloads the file, for as long as the
    /// other process makes progress.
    fn lock(&self, path: &Path, part: &Path, name: &str) -> Result<File, HubTrouble> {
        let failed = |error: &std::io::Error| CompileError::write(path, error);
        let file = File::create(path).map_err(|error| failed(&error))?;
        let size = || std::fs::metadata(part).map_or(0, |part| part.len());
        let (mut last, mut since) = (size(), Instant::now());
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(file),
                Err(TryLockError::Error(error)) => return Err(failed(&error).into()),
                Err(TryLockError::WouldBlock) => {}
            }
            let now = size();
            if now != last {
                (last, since) = (now, Instant::now());
            }
            // The other process may rest and connect again between two pieces.
            let patience = 3 * self.pause + LOOK_INTERVAL;
            if since.elapsed() > patience {
                return Err(HubTrouble::Absent(format!(
                    "another process has been downloading {name} without progress for {} (the \
                     lock is {})",
                    humantime::format_duration(patience),
                    path.display()
                )));
            }
            std::thread::sleep(LOOK_INTERVAL);
        }
    }

    /// Downloads the bytes that `part` lacks.
    fn fill(
        &mut self,
        part: &Path,
        url: &str,
        name: &str,
        facts: &BlobFacts,
    ) -> Result<(), HubTrouble> {
        let failed = |error: &std::io::Error| HubTrouble::Here(CompileError::write(part, error));
        let mut file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(part)
            .map_err(|error| failed(&error))?;
        let mut n_done = file.metadata().map_err(|error| failed(&error))?.len();
        self.progress.begin(CompileStep::Download, facts.bytes);
        self.progress.advance(n_done.min(facts.bytes));
        let mut n_failures = 0;
        loop {
            if n_done > facts.bytes {
                // The bytes are those of another download.
                file.set_len(0).map_err(|error| failed(&error))?;
                n_done = 0;
            }
            if n_done == facts.bytes {
                return file.sync_all().map_err(|error| failed(&error));
            }
            let before = n_done;
            let trouble = match self.piece(&mut file, part, url, name, &mut n_done) {
                Ok(()) if n_done >= facts.bytes => continue,
                Ok(()) => HubTrouble::Absent(format!("{url} ended early")),
                Err(trouble) => trouble,
            };
            let HubTrouble::Absent(reason) = trouble else {
                return Err(trouble);
            };
            if n_done.saturating_sub(before) >= PROGRESS_BYTES {
                n_failures = 0;
            }
            n_failures += 1;
            if n_failures > N_RETRIES {
                return Err(HubTrouble::Absent(format!(
                    "{name} stops after {n_done} of {} bytes, also after {N_RETRIES} retries: \
                     {reason}",
                    facts.bytes
                )));
            }
            tracing::debug!(name, reason, "resuming a download");
            std::thread::sleep(REST * n_failures);
        }
    }

    /// Appends the bytes of one answer, and counts them in `n_done`.
    fn piece(
        &mut self,
        file: &mut File,
        part: &Path,
        url: &str,
        name: &str,
        n_done: &mut u64,
    ) -> Result<(), HubTrouble> {
        let failed = |error: &std::io::Error| HubTrouble::Here(CompileError::write(part, error));
        let mut answer = self.wire.content(self.at, url, name, *n_done)?;
        if answer.start != *n_done {
            file.set_len(answer.start).map_err(|error| failed(&error))?;
            *n_done = answer.start;
        }
        let mut chunk = vec![0; CHUNK];
        loop {
            let n_read = match answer.content.read(&mut chunk) {
                Ok(0) => return Ok(()),
                Ok(n_read) => n_read,
                Err(error) => return Err(self.wire.unanswered(ureq::Error::from(error))),
            };
            file.write_all(&chunk[..n_read])
                .map_err(|error| failed(&error))?;
            *n_done += n_read as u64;
            self.progress.advance(n_read as u64);
        }
    }
}
