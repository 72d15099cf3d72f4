//! Output of a job: files that appear whole or not at all.
//!
//! On a disk a file is written under a temporary name, flushed and renamed. In
//! a bucket an upload, of one or of several pieces, becomes visible once it is
//! complete.

use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use bytes::Bytes;
use futures_util::TryStreamExt as _;
use object_store::{ObjectStoreExt as _, PutMode, PutOptions, WriteMultipart};

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
                let write = move || write_file(&path, &content, false).map(|_| ());
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
                tokio::task::spawn_blocking(move || write_file(&path, &content, true)).await?
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
    std::fs::write(&file, b"probe")?;
    std::fs::remove_file(&file)?;
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
        let metadata = entry.metadata()?;
        if metadata.is_file()
            && let Ok(name) = entry.file_name().into_string()
        {
            found.push((name, metadata.len()));
        }
    }
    Ok(found)
}

/// Writes a file through a temporary file; `false` if `new` is set and the file
/// exists. A kill can leave a dotfile, which the same job overwrites.
fn write_file(path: &Path, content: &[u8], new: bool) -> anyhow::Result<bool> {
    let folder = path.parent().context("the path has no directory")?;
    std::fs::create_dir_all(folder)?;
    let name = path.file_name().context("the path has no file name")?;
    let name = name.to_string_lossy();
    // Jobs that begin at the same time must not write into each other's
    // temporary files.
    let temporary: PathBuf = if new {
        folder.join(format!(".{name}.{}.tmp", std::process::id()))
    } else {
        folder.join(format!(".{name}.tmp"))
    };
    let mut file = std::fs::File::create(&temporary)?;
    file.write_all(content)?;
    file.sync_all()?;
    drop(file);
    let created = if new {
        // A hard link fails where a rename would replace the file.
        let linked = std::fs::hard_link(&temporary, path);
        std::fs::remove_file(&temporary)?;
        match linked {
            Ok(()) => true,
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => false,
            Err(error) => return Err(error.into()),
        }
    } else {
        std::fs::rename(&temporary, path)?;
        true
    };
    // Flushes the directory too, so that the file's name survives a crash of
    // the machine.
    std::fs::File::open(folder)?.sync_all()?;
    Ok(created)
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
}
