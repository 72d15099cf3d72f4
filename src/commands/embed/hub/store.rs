//! Dataset of the hub at one commit, as a store of objects that is only read.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::UNIX_EPOCH;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::stream::{self, BoxStream};
use futures_util::{StreamExt as _, TryStreamExt as _};
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetRange, GetResult, GetResultPayload, ListResult,
    MultipartUpload, ObjectMeta, ObjectStore, PutMultipartOptions, PutOptions, PutPayload,
    PutResult, Result,
};

use super::HubRepository;
use super::client::{HubClient, HubError, HubFailure, HubFile};

/// Bytes of a file that one request reads, as in other stores.
const BLOCK_BYTES: u64 = 4 << 20;
const NAME: &str = "Hugging Face Hub";

/// Files of a dataset at one commit.
#[derive(Debug, Clone)]
pub(super) struct HubStore {
    pub(super) client: Arc<HubClient>,
    pub(super) repository: Arc<HubRepository>,
    pub(super) commit: Arc<str>,
    /// Files that are to be taken of a directory; the first listing of the
    /// directory takes the list.
    pub(super) chosen: Arc<Mutex<HashMap<String, Vec<HubFile>>>>,
}

impl std::fmt::Display for HubStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}@{}", self.repository.name, self.commit)
    }
}

fn failed(path: &str, error: HubError) -> Error {
    let source = Box::new(error);
    match source.kind {
        HubFailure::NoFile => Error::NotFound {
            path: path.to_owned(),
            source,
        },
        _ => Error::Generic {
            store: NAME,
            source,
        },
    }
}

fn meta(file: HubFile) -> Result<ObjectMeta> {
    Ok(ObjectMeta {
        location: Path::parse(&file.path)?,
        // The commit says when a file was changed, and the hash whether.
        last_modified: UNIX_EPOCH.into(),
        size: file.bytes,
        e_tag: Some(file.version),
        version: None,
    })
}

fn read_only<T>(operation: &str) -> Result<T> {
    Err(Error::NotImplemented {
        operation: operation.to_owned(),
        implementer: NAME.to_owned(),
    })
}

impl HubStore {
    async fn block(&self, path: &str, start: u64, end: u64) -> Result<(Bytes, u64)> {
        let block = self
            .client
            .block(&self.repository, &self.commit, path, start..end)
            .await
            .map_err(|error| failed(path, error))?;
        Ok((block.bytes, block.file_bytes))
    }

    async fn files(&self, folder: &str) -> Result<Vec<HubFile>> {
        let chosen = {
            let mut chosen = self.chosen.lock().unwrap_or_else(PoisonError::into_inner);
            chosen.remove(folder)
        };
        if let Some(files) = chosen {
            return Ok(files);
        }
        let files = self
            .client
            .files(&self.repository, &self.commit, folder, |_| true)
            .await;
        match files {
            Ok(files) => Ok(files),
            Err(error) if error.kind == HubFailure::NoFile => Ok(Vec::new()),
            Err(error) => Err(failed(folder, error)),
        }
    }
}

#[async_trait]
impl ObjectStore for HubStore {
    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        let path = location.as_ref();
        if options.head || path.is_empty() {
            let file = if path.is_empty() {
                let text = "the root is a directory".to_owned();
                Err(HubError::new(HubFailure::NoFile, text))
            } else {
                let (repository, commit) = (&self.repository, &self.commit);
                self.client.file(repository, commit, path).await
            };
            let meta = meta(file.map_err(|error| failed(path, error))?)?;
            return Ok(result(meta, 0..0, stream::empty().boxed()));
        }
        let (start, end) = match options.range {
            Some(GetRange::Bounded(range)) => (range.start, Some(range.end)),
            Some(GetRange::Offset(start)) => (start, None),
            Some(GetRange::Suffix(_)) => return read_only("ranges from the end"),
            None => (0, None),
        };
        let first_end = start.saturating_add(BLOCK_BYTES);
        let (first, file_bytes) = self
            .block(path, start, first_end.min(end.unwrap_or(u64::MAX)))
            .await?;
        let end = end.unwrap_or(u64::MAX).min(file_bytes);
        let meta = ObjectMeta {
            location: location.clone(),
            last_modified: UNIX_EPOCH.into(),
            size: file_bytes,
            e_tag: None,
            version: None,
        };
        // Every block has retries of its own, and only one is held at a time.
        let rest = (self.clone(), location.clone(), first_end);
        let rest = stream::try_unfold(rest, move |(store, location, at)| async move {
            if at >= end {
                return Ok(None);
            }
            let next = at.saturating_add(BLOCK_BYTES).min(end);
            let (bytes, _) = store.block(location.as_ref(), at, next).await?;
            Ok(Some((bytes, (store, location, next))))
        });
        let blocks = stream::once(async { Ok(first) }).chain(rest).boxed();
        Ok(result(meta, start..end.max(start), blocks))
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        let store = self.clone();
        let folder = prefix.map_or_else(String::new, ToString::to_string);
        let files = async move {
            let files = store.files(&folder).await?;
            Ok::<_, Error>(stream::iter(files).map(meta))
        };
        stream::once(files).try_flatten().boxed()
    }

    async fn list_with_delimiter(&self, _prefix: Option<&Path>) -> Result<ListResult> {
        read_only("list_with_delimiter")
    }

    async fn put_opts(&self, _: &Path, _: PutPayload, _: PutOptions) -> Result<PutResult> {
        read_only("put")
    }

    async fn put_multipart_opts(
        &self,
        _: &Path,
        _: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        read_only("put_multipart")
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        locations.map(|_| read_only("delete")).boxed()
    }

    async fn copy_opts(&self, _: &Path, _: &Path, _: CopyOptions) -> Result<()> {
        read_only("copy")
    }
}

fn result(
    meta: ObjectMeta,
    range: std::ops::Range<u64>,
    blocks: BoxStream<'static, Result<Bytes>>,
) -> GetResult {
    GetResult {
        payload: GetResultPayload::Stream(blocks),
        meta,
        range,
        attributes: object_store::Attributes::default(),
        extensions: http::Extensions::default(),
    }
}
