//! Where output goes: files appear whole or not at all.
//!
//! On a disk a file is written under another name, flushed and renamed; in a
//! bucket an upload of one or of several parts shows once it is complete.

use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use bytes::Bytes;
use futures_util::TryStreamExt as _;
use object_store::{ObjectStoreExt as _, PutMode, PutOptions, WriteMultipart};

use super::location::{Location, ReadError, Stores};
use crate::files::Trouble;

/// Larger objects are uploaded in pieces, since a request has to fit into its
/// time.
const WHOLE_BYTES_MAX: usize = 8 << 20;
/// Pieces of an upload that are on their way at once.
const PIECES: usize = 4;
/// What this program itself wrote and reads again: a manifest, a record.
const NOTE_BYTES_MAX: u64 = 1 << 30;

/// A folder that is written into.
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
            "--output {text}: nothing can be written over HTTP; give a folder, s3://, gs:// or az://"
        );
        Ok(Self(stores.locate(text)?))
    }

    /// Checks that a folder on a disk can be written into, or made where it is not
    /// there yet; whether a bucket can be shows when the manifest is written.
    pub(super) async fn check(&self) -> anyhow::Result<()> {
        let Location::Local(folder) = &self.0 else {
            return Ok(());
        };
        let folder = folder.clone();
        let probed = tokio::task::spawn_blocking(move || probe(&folder)).await?;
        probed.with_context(|| format!("--output {self} cannot be written"))
    }

    /// Removes a file; there may be none.
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

    /// Writes a file, or replaces it: before, there is the old one or none;
    /// after, the new one.
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
                    // An upload that is not finished leaves no object.
                    upload.finish().await?;
                    Ok(())
                }
                .await
            }
        };
        result.with_context(|| format!("{at} cannot be written"))
    }

    /// Writes a file that must not be there; `false` if it is.
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

    /// A file that this program wrote, if it is there.
    pub(super) async fn read(&self, name: &str) -> anyhow::Result<Option<Bytes>> {
        let at = self.0.join(name);
        match at.read(NOTE_BYTES_MAX).await {
            Ok(found) => Ok(found),
            Err(ReadError::Trouble(Trouble::Missing)) => Ok(None),
            Err(error) => Err(error).with_context(|| format!("{at} cannot be read")),
        }
    }

    /// Names and sizes of the files in a folder; none where there is no folder.
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

/// Writes into the folder, or into the one that it would be made in.
fn probe(folder: &Path) -> anyhow::Result<()> {
    let there = folder.ancestors().find(|folder| folder.exists());
    let there = there.context("nothing of its path is there")?;
    anyhow::ensure!(there.is_dir(), "{} is no folder", there.display());
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

/// `false` when `new` and it is there already. What a kill leaves is a file
/// whose name begins with a point, which the same job writes over.
fn write_file(path: &Path, content: &[u8], new: bool) -> anyhow::Result<bool> {
    let folder = path.parent().context("it has no folder")?;
    std::fs::create_dir_all(folder)?;
    let name = path.file_name().context("it has no name")?;
    let name = name.to_string_lossy();
    // Jobs that begin at once must not write into each other's.
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
        // A link fails where a rename would replace.
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
    // The name itself is to outlive the machine.
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
        // What a killed job left.
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
