//! Location of data: a path, or a URL of an object store.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, UNIX_EPOCH};

use anyhow::Context as _;
use bytes::Bytes;
use futures_util::TryStreamExt as _;
use object_store::aws::AmazonS3Builder;
use object_store::azure::MicrosoftAzureBuilder;
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::http::HttpBuilder;
use object_store::{ClientOptions, ObjectStore, ObjectStoreExt as _, RetryConfig};

use super::address::AddressBook;
use super::web::{WebClient, WebTimes, WebTrust};
use crate::client::pool::ImageFault;
use crate::files::{self, FoundFile, Trouble};
use crate::proto::GrpcCode;

/// Longest time for which a request to a store is retried. After a longer time
/// the credentials may expire between the retries; the same command then
/// resumes the job.
pub(super) const RETRY_TIMEOUT: Duration = Duration::from_mins(4);
const RETRIES_MAX: usize = 60;
/// Longest time for a request. A block of 4 MiB takes about a second, and a
/// request to a bucket that stalls is repeated.
pub(super) const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);
pub(super) const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// File, directory, or prefix of a bucket.
#[derive(Debug, Clone)]
pub(super) enum Location {
    Local(PathBuf),
    Remote {
        store: Arc<dyn ObjectStore>,
        path: object_store::path::Path,
        /// URL as a person would write it.
        url: String,
    },
}

impl std::fmt::Display for Location {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Local(path) => path.display().fmt(f),
            Self::Remote { url, .. } => f.write_str(url),
        }
    }
}

/// File or object that a listing found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ListedObject {
    /// Path below the location that was listed, with slashes.
    pub(super) name: String,
    pub(super) bytes: u64,
    /// Version that differs when the content does: an entity tag, or the time
    /// of the last change.
    pub(super) version: String,
    /// Reason for which the file cannot be read, if the listing shows one.
    pub(super) trouble: Option<ImageFault>,
    /// True if the entry cannot be read and may be a directory with any
    /// content.
    pub(super) may_be_folder: bool,
}

/// Clients of object stores, one for each bucket or host, and one client for
/// single images on web servers.
#[derive(Debug, Default)]
pub(super) struct Stores {
    by_root: Mutex<HashMap<String, Arc<dyn ObjectStore>>>,
    web: OnceLock<WebClient>,
    trust: WebTrust,
}

impl Stores {
    pub(super) fn new(trust: WebTrust) -> Self {
        Self {
            trust,
            ..Self::default()
        }
    }

    /// Finds the location that `text` names: a URL if `text` has a scheme,
    /// otherwise a path.
    pub(super) fn locate(&self, text: &str) -> anyhow::Result<Location> {
        let (scheme, rest) = text.split_once("://").unwrap_or(("file", text));
        anyhow::ensure!(!rest.is_empty(), "'{text}' is neither a path nor a URL");
        if scheme == "file" {
            // A plain error without a cause: a path that is wrong now stays
            // wrong.
            let path = std::path::absolute(rest)
                .map_err(|error| anyhow::anyhow!("{text} is not a path: {error}"))?;
            return Ok(Location::Local(path));
        }
        let (host, key) = rest.split_once('/').unwrap_or((rest, ""));
        let root = format!("{scheme}://{host}");
        let mut stores = self.by_root.lock().unwrap_or_else(PoisonError::into_inner);
        let store = if let Some(store) = stores.get(&root) {
            Arc::clone(store)
        } else {
            let store = connect(scheme, &root)?;
            stores.insert(root, Arc::clone(&store));
            store
        };
        let key = key.trim_end_matches('/');
        // Keys of buckets are written literally, paths of URLs with escapes.
        let path = if scheme.starts_with("http") {
            anyhow::ensure!(
                !key.contains(['?', '#']),
                "{text}: the part after ? or # cannot be requested; give a URL without it"
            );
            object_store::path::Path::from_url_path(key)
        } else {
            object_store::path::Path::parse(key)
        };
        Ok(Location::Remote {
            store,
            path: path.with_context(|| format!("the path of {text} cannot be used"))?,
            url: text.trim_end_matches('/').to_owned(),
        })
    }

    /// Returns the client that reads single images from web servers.
    ///
    /// # Errors
    ///
    /// When the client cannot be made.
    pub(super) fn web(&self) -> anyhow::Result<&WebClient> {
        if let Some(client) = self.web.get() {
            return Ok(client);
        }
        let times = WebTimes {
            connect: CONNECT_TIMEOUT,
            request: REQUEST_TIMEOUT,
        };
        let client = WebClient::new(self.trust, times, AddressBook::default())?;
        Ok(self.web.get_or_init(|| client))
    }
}

/// Makes the client of a store. Credentials and endpoints come from the
/// environment, under the names that each cloud's own tools use (AWS_…,
/// GOOGLE_…, AZURE_…).
fn connect(scheme: &str, root: &str) -> anyhow::Result<Arc<dyn ObjectStore>> {
    // Whichever of the two TLS libraries comes first installs the provider.
    let _ = tokio_rustls::rustls::crypto::ring::default_provider().install_default();
    let retry = RetryConfig {
        max_retries: RETRIES_MAX,
        retry_timeout: RETRY_TIMEOUT,
        ..RetryConfig::default()
    };
    let client = ClientOptions::new()
        .with_timeout(REQUEST_TIMEOUT)
        .with_connect_timeout(CONNECT_TIMEOUT);
    // The builders take client options one by one from the environment; setting
    // all options at the same time would undo that.
    let set = |key, value: Duration| (key, format!("{}s", value.as_secs()));
    let times = [
        set(object_store::ClientConfigKey::Timeout, REQUEST_TIMEOUT),
        set(
            object_store::ClientConfigKey::ConnectTimeout,
            CONNECT_TIMEOUT,
        ),
    ];
    Ok(match scheme {
        "s3" | "s3a" => {
            let mut builder = AmazonS3Builder::from_env().with_url(root).with_retry(retry);
            for (key, value) in times {
                builder =
                    builder.with_config(object_store::aws::AmazonS3ConfigKey::Client(key), value);
            }
            Arc::new(builder.build().with_context(|| root.to_owned())?)
        }
        "gs" => {
            let mut builder = GoogleCloudStorageBuilder::from_env()
                .with_url(root)
                .with_retry(retry);
            for (key, value) in times {
                builder =
                    builder.with_config(object_store::gcp::GoogleConfigKey::Client(key), value);
            }
            Arc::new(builder.build().with_context(|| root.to_owned())?)
        }
        "az" | "abfs" | "abfss" | "adl" => {
            let mut builder = MicrosoftAzureBuilder::from_env()
                .with_url(root)
                .with_retry(retry);
            for (key, value) in times {
                builder =
                    builder.with_config(object_store::azure::AzureConfigKey::Client(key), value);
            }
            Arc::new(builder.build().with_context(|| root.to_owned())?)
        }
        "http" | "https" => Arc::new(
            HttpBuilder::new()
                .with_url(root)
                .with_retry(retry)
                .with_client_options(client.with_allow_http(scheme == "http"))
                .build()
                .with_context(|| root.to_owned())?,
        ),
        "hf" => anyhow::bail!(
            "{root}: hf:// can only be an input of the job; in a list or a table write the file's \
             https:// URL, and give an --output elsewhere"
        ),
        _ => anyhow::bail!(
            "{root}: {scheme}:// is not supported; give a path, or s3://, gs://, az://, http://, \
             https:// or hf://datasets/"
        ),
    })
}

impl Location {
    /// Returns the location `name` below this location.
    pub(super) fn join(&self, name: &str) -> Self {
        match self {
            Self::Local(folder) => Self::Local(folder.join(name)),
            Self::Remote { store, path, url } => Self::Remote {
                store: Arc::clone(store),
                // Parsed literally, since escapes would become part of the
                // name. A part that cannot be literal, such as `..`, is
                // escaped, and found nowhere.
                path: object_store::path::Path::parse(format!("{path}/{name}")).unwrap_or_else(
                    |_| {
                        name.split('/')
                            .fold(path.clone(), object_store::path::Path::join)
                    },
                ),
                url: format!("{url}/{name}"),
            },
        }
    }

    /// Returns the directory that contains this location.
    pub(super) fn parent(&self) -> Self {
        match self {
            Self::Local(path) => Self::Local(path.parent().unwrap_or(path).to_owned()),
            Self::Remote { store, path, url } => {
                let parts: Vec<_> = path.parts().collect();
                let kept = parts.len().saturating_sub(1);
                Self::Remote {
                    store: Arc::clone(store),
                    path: parts.into_iter().take(kept).collect(),
                    url: url
                        .rsplit_once('/')
                        .map_or(url.as_str(), |(parent, _)| parent)
                        .to_owned(),
                }
            }
        }
    }

    /// Returns the URL of this location, if it lies on a web server.
    pub(super) fn web_url(&self) -> Option<reqwest::Url> {
        let Self::Remote { path, url, .. } = self else {
            return None;
        };
        let mut address = reqwest::Url::parse(url).ok()?;
        if !address.scheme().starts_with("http") {
            return None;
        }
        // The path holds literal names, so characters that cannot stand in a
        // URL are escaped here.
        address
            .path_segments_mut()
            .ok()?
            .clear()
            .extend(path.parts());
        address.set_query(None);
        address.set_fragment(None);
        Some(address)
    }

    /// Returns the last part of the path.
    pub(super) fn file_name(&self) -> &str {
        match self {
            Self::Local(path) => path.file_name().and_then(|name| name.to_str()),
            Self::Remote { path, .. } => path.filename(),
        }
        .unwrap_or_default()
    }

    /// Returns the facts about the file at this location; `None` if no file is
    /// there (the location may be a directory).
    pub(super) async fn stat(&self) -> anyhow::Result<Option<ListedObject>> {
        let name = self.file_name().to_owned();
        match self {
            Self::Local(path) => match std::fs::metadata(path) {
                Ok(metadata) if metadata.is_file() => Ok(Some(entry(name, &metadata))),
                // The reason, or what the path is instead, is found by
                // `trouble`.
                Ok(_) | Err(_) => Ok(None),
            },
            Self::Remote { store, path, .. } => match store.head(path).await {
                Ok(meta) => Ok(Some(remote_entry(name, meta))),
                Err(object_store::Error::NotFound { .. }) => Ok(None),
                Err(error) => Err(error).with_context(|| self.to_string()),
            },
        }
    }

    /// Lists all files below this location, by name; none if nothing is there.
    pub(super) async fn list(&self) -> anyhow::Result<Vec<ListedObject>> {
        let mut entries = match self {
            Self::Local(folder) => {
                let folder = folder.clone();
                tokio::task::spawn_blocking(move || {
                    if !folder.is_dir() {
                        return Ok(Vec::new());
                    }
                    let found = files::below(&folder)?;
                    let entries = found.into_iter().map(|found| found_entry(&folder, found));
                    Ok::<_, anyhow::Error>(entries.collect())
                })
                .await??
            }
            Self::Remote { store, path, .. } => {
                let prefix = path.as_ref().len();
                let found = store.list(Some(path)).map_ok(|meta| {
                    let name = meta.location.as_ref()[prefix..].trim_start_matches('/');
                    remote_entry(name.to_owned(), meta)
                });
                found
                    .try_collect()
                    .await
                    .with_context(|| self.to_string())?
            }
        };
        entries.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        Ok(entries)
    }

    /// Returns the reason for which a file on a disk cannot be opened. A bucket
    /// reports its reason only when it is read.
    pub(super) fn trouble(&self) -> anyhow::Result<Option<Trouble>> {
        let Self::Local(path) = self else {
            return Ok(None);
        };
        let found = files::read(path, 0).with_context(|| self.to_string())?;
        Ok(found.err())
    }

    /// Reads a whole file; returns `None` for a file that is larger than `max`
    /// bytes.
    pub(super) async fn read(&self, max: u64) -> Result<Option<Bytes>, ReadError> {
        match self {
            Self::Local(path) => {
                let path = path.clone();
                let read = tokio::task::spawn_blocking(move || files::read(&path, max));
                Ok(read
                    .await
                    .map_err(std::io::Error::other)???
                    .map(Bytes::from))
            }
            Self::Remote { store, path, url } => {
                let found = store.get(path).await;
                let found = found.map_err(|error| refused(url, error))?;
                if found.meta.size > max {
                    return Ok(None);
                }
                Ok(Some(found.bytes().await?))
            }
        }
    }
}

/// Reason for which a file could not be read.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReadError {
    /// The file cannot be read, now or later.
    #[error(transparent)]
    Trouble(#[from] Trouble),
    #[error(transparent)]
    Io(#[from] std::io::Error),
    #[error(transparent)]
    Store(object_store::Error),
}

impl From<object_store::Error> for ReadError {
    fn from(error: object_store::Error) -> Self {
        match error {
            object_store::Error::NotFound { .. } => Trouble::Missing.into(),
            error => Self::Store(error),
        }
    }
}

/// Converts a store's error. On a web server each URL has its own permissions,
/// so a URL that may not be read shows nothing about the others. In a bucket
/// the cause is credentials that have expired, and a job that continued would
/// fail every image.
fn refused(url: &str, error: object_store::Error) -> ReadError {
    use object_store::Error::{PermissionDenied, Unauthenticated};
    match error {
        PermissionDenied { .. } | Unauthenticated { .. } if url.starts_with("http") => {
            Trouble::Denied.into()
        }
        error => error.into(),
    }
}

fn entry(name: String, metadata: &std::fs::Metadata) -> ListedObject {
    let changed = metadata.modified().ok();
    let changed = changed.and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    ListedObject {
        name,
        bytes: metadata.len(),
        version: changed.unwrap_or_default().as_nanos().to_string(),
        trouble: None,
        may_be_folder: false,
    }
}

fn remote_entry(name: String, meta: object_store::ObjectMeta) -> ListedObject {
    ListedObject {
        name,
        bytes: meta.size,
        version: meta
            .e_tag
            .unwrap_or_else(|| meta.last_modified.timestamp_micros().to_string()),
        trouble: None,
        may_be_folder: false,
    }
}

fn found_entry(folder: &Path, found: FoundFile) -> ListedObject {
    let below = found.path.strip_prefix(folder).unwrap_or(&found.path);
    let name = below.to_string_lossy().into_owned();
    let unnamed = below.to_str().is_none().then(|| ImageFault {
        code: GrpcCode::InvalidArgument,
        message: "the file's name is not UTF-8, and ids must be text; rename the file".to_owned(),
    });
    let may_be_folder = found.may_be_folder();
    match found.file {
        Ok(metadata) => ListedObject {
            trouble: unnamed,
            ..entry(name, &metadata)
        },
        Err(trouble) => ListedObject {
            name,
            bytes: 0,
            version: String::new(),
            trouble: Some(unnamed.unwrap_or_else(|| fault(&trouble))),
            may_be_folder,
        },
    }
}

/// Converts a file's trouble into the fault that the error file records.
pub(super) fn fault(trouble: &Trouble) -> ImageFault {
    let code = match trouble {
        Trouble::Missing | Trouble::LinkNowhere | Trouble::Folder => GrpcCode::NotFound,
        Trouble::Denied | Trouble::FolderDenied => GrpcCode::PermissionDenied,
        Trouble::LinkBroken(_) | Trouble::LinkCircle | Trouble::Special | Trouble::Deep => {
            GrpcCode::FailedPrecondition
        }
        Trouble::Name(_) => GrpcCode::InvalidArgument,
    };
    ImageFault {
        code,
        message: trouble.to_string(),
    }
}

/// Expands the brace patterns `{a,b}` and `{000..012}`, as shells and
/// WebDataset do.
pub(super) fn expand(pattern: &str) -> anyhow::Result<Vec<String>> {
    /// Names that all braces together may make; more is taken for a mistyped
    /// range.
    const EXPANDED_MAX: usize = 1_000_000;
    let Some((before, rest)) = pattern.split_once('{') else {
        return Ok(vec![pattern.to_owned()]);
    };
    let (inside, after) = rest
        .split_once('}')
        .with_context(|| format!("{pattern} has a brace that is not closed"))?;
    let middles = match inside.split_once("..") {
        Some((first, last)) => range(first, last, EXPANDED_MAX)
            .with_context(|| format!("{pattern}: {{{inside}}} is not a range such as 000..012"))?,
        None => inside.split(',').map(str::to_owned).collect(),
    };
    let afters = expand(after)?;
    anyhow::ensure!(
        middles.len().saturating_mul(afters.len()) <= EXPANDED_MAX,
        "{pattern} expands to over {EXPANDED_MAX} names; split the job"
    );
    let join = |middle: &String| {
        let start = format!("{before}{middle}");
        afters
            .iter()
            .map(move |after| format!("{start}{after}"))
            .collect::<Vec<_>>()
    };
    Ok(middles.iter().flat_map(join).collect())
}

fn range(first: &str, last: &str, max: usize) -> Option<Vec<String>> {
    let (from, to): (u64, u64) = (first.parse().ok()?, last.parse().ok()?);
    let wanted = usize::try_from(to.checked_sub(from)?)
        .ok()?
        .checked_add(1)?;
    (wanted <= max).then(|| {
        let width = first.len();
        (from..=to).map(|n| format!("{n:0width$}")).collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn braces_are_written_out() {
        let check = |pattern: &str, expected: &str| {
            assert_eq!(expand(pattern).unwrap().join(" "), expected);
        };
        check("a.tar", "a.tar");
        check("{008..011}.tar", "008.tar 009.tar 010.tar 011.tar");
        check("{a,b}/{1..2}.tar", "a/1.tar a/2.tar b/1.tar b/2.tar");
        for wrong in ["{1..x}.tar", "{3..1}", "{1..9999999}", "{1..2"] {
            assert!(expand(wrong).is_err(), "{wrong}");
        }
    }

    #[tokio::test]
    async fn folders_are_listed_by_name_without_what_is_hidden() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["b.png", "a/c.png", ".hidden/d.png", "a/#1.png"] {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, name).unwrap();
        }
        let location = Stores::default()
            .locate(dir.path().to_str().unwrap())
            .unwrap();
        let names: Vec<String> = location
            .list()
            .await
            .unwrap()
            .into_iter()
            .map(|entry| entry.name)
            .collect();
        assert_eq!(names, ["a/#1.png", "a/c.png", "b.png"]);
        let read = location.join("a/c.png").read(100).await.unwrap();
        assert_eq!(read.as_deref(), Some(&b"a/c.png"[..]));
        assert_eq!(location.join("a/c.png").read(2).await.unwrap(), None);
        assert!(matches!(
            location.join("nowhere").read(2).await,
            Err(ReadError::Trouble(Trouble::Missing))
        ));
    }

    #[test]
    fn urls_keep_their_parts() {
        let at = Stores::default()
            .locate("http://127.0.0.1:1/a/b.tar")
            .unwrap();
        assert_eq!(at.to_string(), "http://127.0.0.1:1/a/b.tar");
        assert_eq!(at.file_name(), "b.tar");
        assert_eq!(at.parent().to_string(), "http://127.0.0.1:1/a");
        assert_eq!(
            at.parent().join("c/d").to_string(),
            "http://127.0.0.1:1/a/c/d"
        );
        let Location::Remote { path, .. } = at.parent().join("#1/50 %?.png") else {
            unreachable!("it is a URL");
        };
        assert_eq!(path.as_ref(), "a/#1/50 %?.png");
        let escaped = Stores::default().locate("http://127.0.0.1:1/a%20b.tar");
        assert_eq!(escaped.unwrap().file_name(), "a b.tar");
        let list = Stores::default().locate("http://127.0.0.1:1/a%20b/l.txt");
        let image = list.unwrap().parent().join("#1/50 %?.png");
        let address = image.web_url().unwrap();
        assert_eq!(
            address.as_str(),
            "http://127.0.0.1:1/a%20b/%231/50%20%25%3F.png"
        );
        assert_eq!(Stores::default().locate("/a.png").unwrap().web_url(), None);
        for empty in ["", "file://", "http://"] {
            assert!(Stores::default().locate(empty).is_err(), "{empty}");
        }
        for wrong in ["ftp://x/y", "https://x/y.tar?token=1"] {
            assert!(Stores::default().locate(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn an_address_that_is_forbidden_is_one_file_and_a_bucket_is_all() {
        let forbidden = || object_store::Error::PermissionDenied {
            path: "a.png".to_owned(),
            source: "403".into(),
        };
        let of = |url| refused(url, forbidden());
        assert!(matches!(
            of("https://example.org/a.png"),
            ReadError::Trouble(Trouble::Denied)
        ));
        assert!(matches!(of("s3://bucket/a.png"), ReadError::Store(_)));
    }
}
