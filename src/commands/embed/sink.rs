//! Output of a job: files that appear whole or not at all.
//!
//! On a disk a file is written under a temporary name, flushed and renamed. In
//! a bucket an upload, of one or of several pieces, becomes visible once it is
//! complete.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::Context as _;
use bytes::Bytes;
use futures_util::TryStreamExt as _;
use object_store::{ObjectStoreExt as _, PutMode, PutOptions, UpdateVersion, WriteMultipart};

use super::location::{Location, ReadError, Stores};
use crate::files::Trouble;
use crate::proto::GrpcCode;

/// Largest object that is uploaded in one request. Larger objects are uploaded
/// in pieces, since a request must fit into its time limit.
const WHOLE_BYTES_MAX: usize = 8 << 20;
/// Pieces of an upload that are in flight at the same time.
const PIECES: usize = 4;
/// Largest file that is read back: a manifest or a record, which this program
/// wrote.
const NOTE_BYTES_MAX: u64 = 1 << 30;
/// Largest file that is read with its version: a lease, which takes 500 bytes.
const SMALL_BYTES_MAX: u64 = 1 << 20;

/// Content of a file that was read or written, by which a change is noticed.
#[derive(Debug, Clone)]
pub(super) struct FileVersion {
    pub(super) content: Bytes,
    /// Version by the store; none on a disk.
    of_store: Option<UpdateVersion>,
}

/// Directory, or prefix of a bucket, that output is written into.
#[derive(Debug, Clone)]
pub(super) struct Sink(Location);

impl std::fmt::Display for Sink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

impl Sink {
    pub(super) fn open(text: &str, stores: &Stores) -> anyhow::Result<Self> {
        anyhow::ensure!(
            !text.starts_with("http://") && !text.starts_with("https://"),
            "--output {text}: cannot write over HTTP; give a directory, s3://, gs:// or az://"
        );
        Ok(Self(stores.locate(text)?))
    }

    /// Makes the output of a store in memory.
    #[cfg(test)]
    pub(super) fn in_memory(store: std::sync::Arc<dyn object_store::ObjectStore>) -> Self {
        Self(Location::Remote {
            store,
            path: object_store::path::Path::from("job"),
            url: "memory://bucket/job".to_owned(),
        })
    }

    /// True for a directory on a disk of this machine or network.
    pub(super) fn is_local(&self) -> bool {
        matches!(self.0, Location::Local(_))
    }

    /// Checks that a directory on a disk can be written into, or created if it
    /// does not exist. A bucket shows whether it can be written only when the
    /// manifest is written.
    pub(super) async fn check(&self) -> anyhow::Result<()> {
        let Location::Local(folder) = &self.0 else {
            return Ok(());
        };
        let folder = folder.clone();
        let probed = tokio::task::spawn_blocking(move || probe(&folder)).await?;
        probed.with_context(|| format!("--output {self} cannot be written"))
    }

    /// Removes a file; a file that does not exist is no error.
    pub(super) async fn remove(&self, name: &str) -> anyhow::Result<()> {
        let at = self.0.join(name);
        let result: anyhow::Result<()> = match &at {
            Location::Local(path) => match std::fs::remove_file(path) {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
                result => result.map_err(Into::into),
            },
            Location::Remote { store, path, .. } => match store.delete(path).await {
                Err(object_store::Error::NotFound { .. }) => Ok(()),
                result => result.map_err(Into::into),
            },
        };
        result.with_context(|| format!("{at} cannot be removed"))
    }

    /// Writes or replaces a file. A reader finds the old file, or none, until
    /// the new file is complete.
    pub(super) async fn write(&self, name: &str, content: Bytes) -> anyhow::Result<()> {
        let at = self.0.join(name);
        let result = match &at {
            Location::Local(path) => {
                let path = path.clone();
                let write = move || write_file(&path, &content, Placement::Replace).map(|_| ());
                tokio::task::spawn_blocking(write).await?
            }
            Location::Remote { store, path, .. } if content.len() <= WHOLE_BYTES_MAX => store
                .put(path, content.into())
                .await
                .map(|_| ())
                .map_err(Into::into),
            Location::Remote { store, path, .. } => {
                async {
                    let mut upload = WriteMultipart::new(store.put_multipart(path).await?);
                    for piece in content.chunks(WHOLE_BYTES_MAX) {
                        upload.wait_for_capacity(PIECES).await?;
                        upload.put(content.slice_ref(piece));
                    }
                    // An unfinished upload leaves no object.
                    upload.finish().await?;
                    Ok(())
                }
                .await
            }
        };
        result.with_context(|| format!("{at} cannot be written"))
    }

    /// Writes a file that must not exist; returns `false` if the file exists.
    pub(super) async fn create(&self, name: &str, content: Bytes) -> anyhow::Result<bool> {
        let at = self.0.join(name);
        let result = match &at {
            Location::Local(path) => {
                let path = path.clone();
                let write = move || write_file(&path, &content, Placement::Create);
                tokio::task::spawn_blocking(write).await?
            }
            Location::Remote { store, path, .. } => {
                let options = PutOptions::from(PutMode::Create);
                match store.put_opts(path, content.into(), options).await {
                    Ok(_) => Ok(true),
                    Err(object_store::Error::AlreadyExists { .. }) => Ok(false),
                    Err(error) => Err(error.into()),
                }
            }
        };
        result.with_context(|| format!("{at} cannot be written"))
    }

    /// Reads a small file together with its version; `None` if the file does not
    /// exist.
    pub(super) async fn read_version(&self, name: &str) -> anyhow::Result<Option<FileVersion>> {
        let at = self.0.join(name);
        let Location::Remote { store, path, .. } = &at else {
            let content = self.read(name).await?;
            return Ok(content.map(|content| FileVersion {
                content,
                of_store: None,
            }));
        };
        let read = async {
            let found = match store.get(path).await {
                Err(object_store::Error::NotFound { .. }) => return Ok(None),
                found => found?,
            };
            let version = UpdateVersion {
                e_tag: found.meta.e_tag.clone(),
                version: found.meta.version.clone(),
            };
            anyhow::ensure!(
                found.meta.size <= SMALL_BYTES_MAX,
                "it has {} bytes; the limit is {SMALL_BYTES_MAX}",
                found.meta.size
            );
            let content = found.bytes().await?;
            Ok(Some(FileVersion {
                content,
                of_store: Some(version),
            }))
        };
        read.await.with_context(|| format!("{at} cannot be read"))
    }

    /// Replaces a small file if it is still `old`; returns its new version, or
    /// `None` if it has changed. On a disk the file is compared first, which
    /// leaves a moment in which it may change; so does a store that knows no
    /// conditions.
    pub(super) async fn replace(
        &self,
        name: &str,
        old: &FileVersion,
        content: Bytes,
    ) -> anyhow::Result<Option<FileVersion>> {
        let at = self.0.join(name);
        if let (Location::Remote { store, path, .. }, Some(version)) = (&at, &old.of_store) {
            use object_store::Error::{NotFound, NotImplemented, NotSupported, Precondition};
            let options = PutOptions::from(PutMode::Update(version.clone()));
            match store.put_opts(path, content.clone().into(), options).await {
                Ok(put) => {
                    return Ok(Some(FileVersion {
                        content,
                        of_store: Some(put.into()),
                    }));
                }
                Err(Precondition { .. } | NotFound { .. }) => return Ok(None),
                Err(NotImplemented { .. } | NotSupported { .. }) => {}
                Err(error) => {
                    return Err(error).with_context(|| format!("{at} cannot be written"));
                }
            }
        }
        let there = self.read_version(name).await?;
        if there.is_none_or(|there| there.content != old.content) {
            return Ok(None);
        }
        if let Location::Local(path) = &at {
            let (path, content) = (path.clone(), content.clone());
            let write = move || write_file(&path, &content, Placement::ReplaceShared);
            tokio::task::spawn_blocking(write)
                .await?
                .with_context(|| format!("{at} cannot be written"))?;
        } else {
            self.write(name, content.clone()).await?;
        }
        let there = self.read_version(name).await?;
        Ok(there.filter(|there| there.content == content))
    }

    /// Reads a file that this program wrote; `None` if the file does not exist.
    pub(super) async fn read(&self, name: &str) -> anyhow::Result<Option<Bytes>> {
        let at = self.0.join(name);
        match at.read(NOTE_BYTES_MAX).await {
            Ok(found) => Ok(found),
            Err(ReadError::Trouble(Trouble::Missing)) => Ok(None),
            // A bucket's words for the same.
            Err(ReadError::Refused(fault)) if fault.code == GrpcCode::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| format!("{at} cannot be read")),
        }
    }

    /// Lists names and sizes of the files in a directory; empty if the
    /// directory does not exist.
    pub(super) async fn list(&self, folder: &str) -> anyhow::Result<Vec<(String, u64)>> {
        let at = if folder.is_empty() {
            self.0.clone()
        } else {
            self.0.join(folder)
        };
        if let Location::Local(path) = &at {
            return list_folder(path).with_context(|| format!("{at} cannot be read"));
        }
        let Location::Remote { store, path, .. } = &at else {
            return Ok(Vec::new());
        };
        let found = store.list(Some(path));
        let prefix = path.as_ref().len();
        found
            .map_ok(|meta| {
                let name = meta.location.as_ref()[prefix..].trim_start_matches('/');
                (name.to_owned(), meta.size)
            })
            .try_filter(|(name, _)| std::future::ready(!name.contains('/')))
            .try_collect()
            .await
            .with_context(|| format!("{at} cannot be read"))
    }
}

/// Writes a temporary file into the directory, or into its nearest existing
/// parent.
fn probe(folder: &Path) -> anyhow::Result<()> {
    let there = folder.ancestors().find(|folder| folder.exists());
    let there = there.context("no directory of this path exists")?;
    anyhow::ensure!(there.is_dir(), "{} is not a directory", there.display());
    let file = there.join(format!(".imagegpt.{}.tmp", std::process::id()));
    // A full disk may take the name and not the content.
    let written = std::fs::write(&file, b"probe");
    let removed = std::fs::remove_file(&file);
    written?;
    removed?;
    Ok(())
}

fn list_folder(path: &Path) -> std::io::Result<Vec<(String, u64)>> {
    let mut found = Vec::new();
    let entries = match std::fs::read_dir(path) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(found),
        Err(error) => return Err(error),
    };
    for entry in entries {
        let entry = entry?;
        let metadata = match entry.metadata() {
            // Another process has renamed or removed the file since its name was
            // read, as each writer does with its temporary file.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            metadata => metadata?,
        };
        if metadata.is_file()
            && let Ok(name) = entry.file_name().into_string()
        {
            found.push((name, metadata.len()));
        }
    }
    Ok(found)
}

/// True if a disk or a quota is full, or a file over a limit of the process: an
/// error that passes once there is room.
pub(super) fn is_full(error: &anyhow::Error) -> bool {
    use std::io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
    error.chain().any(|cause| {
        let cause = cause.downcast_ref::<std::io::Error>();
        let kind = cause.map(std::io::Error::kind);
        matches!(kind, Some(StorageFull | QuotaExceeded | FileTooLarge))
    })
}

/// Ways of placing a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Placement {
    /// Replaces a file that only one process writes.
    Replace,
    /// Replaces a file that several processes may write at the same time.
    ReplaceShared,
    /// Creates a file that must not exist.
    Create,
}

/// Writes a file through a temporary file; `false` if it must not exist and
/// does. A kill can leave a dotfile, which the same job overwrites; an error
/// leaves none, since a disk that is full keeps no room for its remains.
fn write_file(path: &Path, content: &[u8], placement: Placement) -> anyhow::Result<bool> {
    let folder = path.parent().context("the path has no directory")?;
    std::fs::create_dir_all(folder)?;
    let name = path.file_name().context("the path has no file name")?;
    let name = name.to_string_lossy();
    // Jobs that begin at the same time must not write into each other's
    // temporary files.
    let temporary: PathBuf = if placement == Placement::Replace {
        folder.join(format!(".{name}.tmp"))
    } else {
        static WRITES: AtomicU64 = AtomicU64::new(0);
        let (pid, n) = (std::process::id(), WRITES.fetch_add(1, Ordering::Relaxed));
        folder.join(format!(".{name}.{pid}-{n}.tmp"))
    };
    let placed = put_content(&temporary, content).and_then(|()| {
        if placement != Placement::Create {
            return std::fs::rename(&temporary, path).map(|()| true);
        }
        // A hard link fails where a rename would replace the file.
        let linked = std::fs::hard_link(&temporary, path);
        std::fs::remove_file(&temporary)?;
        match linked {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(false),
            Err(error) => Err(error),
        }
    });
    let created = match placed {
        Ok(created) => created,
        Err(error) => {
            // The first error is the one that counts.
            let _ = std::fs::remove_file(&temporary);
            return Err(error.into());
        }
    };
    // Flushes the directory too, so that the file's name survives a crash of
    // the machine.
    std::fs::File::open(folder)?.sync_all()?;
    Ok(created)
}

fn put_content(path: &Path, content: &[u8]) -> std::io::Result<()> {
    let mut file = std::fs::File::create(path)?;
    file.write_all(content)?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn files_are_whole_and_are_created_once() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("out");
        let sink = Sink::open(folder.to_str().unwrap(), &Stores::default()).unwrap();
        assert_eq!(sink.list("a").await.unwrap(), []);
        assert_eq!(sink.read("a/b").await.unwrap(), None);
        // A temporary file that a killed job left.
        std::fs::create_dir_all(folder.join("a")).unwrap();
        std::fs::write(folder.join("a/.b.tmp"), "longer than what follows").unwrap();
        sink.write("a/b", "one".into()).await.unwrap();
        sink.write("a/b", "two".into()).await.unwrap();
        assert_eq!(sink.read("a/b").await.unwrap().unwrap(), "two");
        assert!(sink.create("a/c", "first".into()).await.unwrap());
        assert!(!sink.create("a/c", "second".into()).await.unwrap());
        assert_eq!(sink.read("a/c").await.unwrap().unwrap(), "first");
        let mut names = sink.list("a").await.unwrap();
        names.sort();
        assert_eq!(names, [("b".to_owned(), 3), ("c".to_owned(), 5)]);
        assert!(Sink::open("http://a/b", &Stores::default()).is_err());
    }

    #[test]
    fn a_directory_is_listed_while_files_come_and_go() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("stays"), "content").unwrap();
        let (before, after) = (dir.path().join(".temporary"), dir.path().join("comes"));
        let (stop, stopped) = std::sync::mpsc::channel::<()>();
        let writer = std::thread::spawn(move || {
            while stopped.try_recv() == Err(std::sync::mpsc::TryRecvError::Empty) {
                std::fs::write(&before, "content").unwrap();
                std::fs::rename(&before, &after).unwrap();
                std::fs::remove_file(&after).unwrap();
            }
        });
        // Hundreds of these meet an entry whose file has gone since.
        for _ in 0..20_000 {
            let listed = list_folder(dir.path()).unwrap();
            assert!(listed.contains(&("stays".to_owned(), 7)));
        }
        drop(stop);
        writer.join().unwrap();
    }

    #[test]
    fn a_failed_write_leaves_no_temporary_file() {
        let dir = tempfile::tempdir().unwrap();
        // A directory in the place of the file lets the last step fail.
        let path = dir.path().join("a");
        std::fs::create_dir_all(path.join("b")).unwrap();
        for placement in [Placement::Replace, Placement::ReplaceShared] {
            write_file(&path, b"content", placement).unwrap_err();
        }
        assert!(!write_file(&path, b"content", Placement::Create).unwrap());
        let names: Vec<_> = std::fs::read_dir(dir.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        assert_eq!(names, ["a"]);
    }

    #[test]
    fn full_disks_are_told_from_other_errors() {
        // Linux's numbers: EFBIG, ENOSPC, EDQUOT; EACCES, EROFS.
        for (number, expected) in [
            (27, true),
            (28, true),
            (122, true),
            (13, false),
            (30, false),
        ] {
            let error = anyhow::Error::from(std::io::Error::from_raw_os_error(number));
            assert_eq!(
                is_full(&error.context("cannot be written")),
                expected,
                "{number}"
            );
        }
    }
}
