//! Location of data: a path, or a URL of an object store.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::UNIX_EPOCH;

use anyhow::Context as _;
use bytes::Bytes;
use futures_util::TryStreamExt as _;
use object_store::{Attribute, ObjectStore, ObjectStoreExt as _};

use super::address::AddressBook;
use super::connect::{CONNECT_TIMEOUT, NoCredentials, REQUEST_TIMEOUT, connect};
use super::encoding::{BodyDecoder, BodyRefused};
use super::web::{WebClient, WebTimes, WebTrust};
use super::wire::odd_key;
use crate::client::pool::ImageFault;
use crate::files::{self, FoundFile, HiddenEntry, Trouble, name_as_text};
use crate::proto::GrpcCode;

/// Parameters of a URL's query that sign the request and change with each
/// signature; the name of the file is the same without them.
const SIGNATURES: [&str; 22] = [
    "awsaccesskeyid",
    "expires",
    "googleaccessid",
    "key-pair-id",
    "policy",
    "rscc",
    "rscd",
    "rsct",
    "se",
    "security-token",
    "sig",
    "signature",
    "ske",
    "skoid",
    "sks",
    "skt",
    "sktid",
    "skv",
    "sp",
    "spr",
    "st",
    "token",
];

/// Returns the scheme of a URL in lower case; `None` for a path.
pub(super) fn scheme_of(text: &str) -> Option<String> {
    let (scheme, rest) = text.split_once(':')?;
    let is_scheme = scheme.starts_with(|first: char| first.is_ascii_alphabetic())
        && scheme
            .chars()
            .all(|letter| letter.is_ascii_alphanumeric() || "+-.".contains(letter));
    let scheme = scheme.to_ascii_lowercase();
    let is_url = rest.starts_with("//") || (scheme == "file" && rest.starts_with('/'));
    (is_scheme && is_url).then_some(scheme)
}

/// True for a name that does not depend on the place of its list.
pub(super) fn is_absolute(name: &str) -> bool {
    name.starts_with('/') || scheme_of(name).is_some()
}

/// Returns the path that a file URL names: its escapes are decoded, unless only
/// a file exists that has them in its name.
fn file_path(text: &str) -> PathBuf {
    let rest = text.split_once(':').map_or(text, |(_, rest)| rest);
    let literal = match rest.strip_prefix("//") {
        // Without a host, or with this one; a relative path is taken as well.
        Some(rest) => match rest.split_once('/') {
            Some((host, _)) if host.eq_ignore_ascii_case("localhost") => &rest[host.len()..],
            _ => rest,
        },
        None => rest,
    };
    let literal = PathBuf::from(literal);
    let url = format!("file://{}", literal.display());
    let decoded = reqwest::Url::parse(&url)
        .ok()
        .filter(|url| literal.is_absolute() && url.query().is_none() && url.fragment().is_none())
        .and_then(|url| url.to_file_path().ok());
    match decoded {
        Some(decoded) if decoded.exists() || !literal.exists() => decoded,
        _ => literal,
    }
}

/// Returns the query of a URL without its signature, with its question mark.
fn unsigned(query: &str) -> String {
    let parts = query.split('&').filter(|part| {
        let name = part.split('=').next().unwrap_or_default();
        let name = name.to_ascii_lowercase();
        let is_signature = name.starts_with("x-amz-")
            || name.starts_with("x-goog-")
            || name.starts_with("x-oss-")
            || SIGNATURES.contains(&name.as_str());
        // The permissions and the version of Azure's signatures.
        !is_signature && !matches!(name.as_str(), "sv" | "sr" | "srt" | "ss")
    });
    let parts: Vec<&str> = parts.collect();
    if parts.is_empty() {
        String::new()
    } else {
        format!("?{}", parts.join("&"))
    }
}

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
        let empty = || anyhow::anyhow!("'{text}' is neither a path nor a URL");
        let scheme = scheme_of(text);
        let Some(scheme) = scheme.filter(|scheme| scheme != "file") else {
            let path = match scheme_of(text) {
                Some(_) => file_path(text),
                None => PathBuf::from(text),
            };
            anyhow::ensure!(!path.as_os_str().is_empty(), empty());
            // A plain error without a cause: a path that is wrong now stays
            // wrong.
            let path = std::path::absolute(path)
                .map_err(|error| anyhow::anyhow!("{text} is not a path: {error}"))?;
            return Ok(Location::Local(path));
        };
        let rest = &text[scheme.len() + "://".len()..];
        anyhow::ensure!(!rest.is_empty(), empty());
        let (host, key) = rest.split_once('/').unwrap_or((rest, ""));
        let root = format!("{scheme}://{host}");
        if !scheme.starts_with("http") {
            // Keys of buckets are written literally.
            let key = key.trim_end_matches('/');
            let path = object_store::path::Path::parse(key);
            return Ok(Location::Remote {
                path: path.with_context(|| format!("the path of {text} cannot be used"))?,
                store: self.store(&scheme, root)?,
                url: format!("{scheme}://{}", rest.trim_end_matches('/')),
            });
        }
        anyhow::ensure!(
            !key.contains('#'),
            "{text}: the part after # cannot be requested; give a URL without it"
        );
        let (key, query) = match key.split_once('?') {
            Some((key, query)) => (key, Some(query)),
            None => (key, None),
        };
        let key = key.trim_end_matches('/');
        let path = object_store::path::Path::from_url_path(key)
            .with_context(|| format!("the path of {text} cannot be used"))?;
        let slash = if key.is_empty() { "" } else { "/" };
        let shown = query.map_or_else(String::new, unsigned);
        Ok(Location::Remote {
            path,
            url: format!("{root}{slash}{key}{shown}"),
            store: match query {
                // The client of a presigned URL is of no use for another.
                Some(query) => connect(&scheme, &root, Some(query.to_owned()))?,
                None => self.store(&scheme, root)?,
            },
        })
    }

    /// Returns the client of a bucket or host.
    fn store(&self, scheme: &str, root: String) -> anyhow::Result<Arc<dyn ObjectStore>> {
        let mut stores = self.by_root.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(store) = stores.get(&root) {
            return Ok(Arc::clone(store));
        }
        let store = connect(scheme, &root, None)?;
        stores.insert(root, Arc::clone(&store));
        Ok(store)
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

    /// Returns the location that a list names below this directory.
    ///
    /// # Errors
    ///
    /// When a bucket can have no object of this name.
    pub(super) fn checked_join(&self, name: &str) -> anyhow::Result<Self> {
        if let Self::Remote { url, .. } = self {
            let is_odd = |part: &str| matches!(part, "" | "." | "..");
            anyhow::ensure!(
                !name.split('/').any(is_odd),
                "{name} has a part that is empty, . or .., and keys of a bucket have no such \
                 parts; write the name below {url}, or the whole URL"
            );
        }
        Ok(self.join(name))
    }

    /// Returns the URL of a file that a list on a web server names, relative to
    /// this directory.
    pub(super) fn web_join(&self, name: &str) -> Option<reqwest::Url> {
        let mut url = self.web_url()?;
        {
            let mut parts = url.path_segments_mut().ok()?;
            parts.pop_if_empty();
            for part in name.split('/') {
                match part {
                    "" | "." => {}
                    ".." => {
                        parts.pop();
                    }
                    part => {
                        parts.push(part);
                    }
                }
            }
        }
        Some(url)
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
    /// Dotfiles are among them, for the count of what is passed over.
    pub(super) async fn list(&self) -> anyhow::Result<Vec<ListedObject>> {
        let mut entries = match self {
            Self::Local(folder) => {
                let folder = folder.clone();
                tokio::task::spawn_blocking(move || {
                    if !folder.is_dir() {
                        return Ok(Vec::new());
                    }
                    let found = files::below(&folder)?;
                    let files = found.files.into_iter();
                    let entries = files.map(|found| found_entry(&folder, found));
                    let hidden = found.hidden.into_iter();
                    let entries = entries.chain(hidden.map(|found| hidden_entry(&folder, &found)));
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
                let encoding = found.attributes.get(&Attribute::ContentEncoding);
                let mut body = BodyDecoder::new(encoding.map(AsRef::as_ref), max);
                let mut pieces = found.into_stream();
                while let Some(piece) = pieces.try_next().await? {
                    match body.push(&piece) {
                        Err(BodyRefused::TooLarge(_)) => return Ok(None),
                        pushed => pushed.map_err(|error| undecoded(&error))?,
                    }
                }
                match body.finish() {
                    Err(BodyRefused::TooLarge(_)) => Ok(None),
                    whole => Ok(Some(whole.map_err(|error| undecoded(&error))?)),
                }
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
    /// The store will never hand out the file.
    #[error("{}", .0.message)]
    Refused(ImageFault),
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

fn undecoded(error: &BodyRefused) -> ReadError {
    ReadError::Refused(ImageFault {
        code: GrpcCode::DataLoss,
        message: error.to_string(),
    })
}

/// Converts a store's error.
fn refused(url: &str, error: object_store::Error) -> ReadError {
    match lasting_fault_at(url, &error) {
        Some(fault) => ReadError::Refused(fault),
        None => error.into(),
    }
}

/// Returns the fault of a file that its store will never hand out; `None` for
/// an error that may pass.
pub(super) fn lasting_fault(
    location: &Location,
    error: &object_store::Error,
) -> Option<ImageFault> {
    match location {
        Location::Local(_) => None,
        Location::Remote { url, .. } => lasting_fault_at(url, error),
    }
}

/// On a web server each URL has its own permissions, so a URL that may not be
/// read shows nothing about the others. In a bucket the cause is credentials
/// that have expired, and a job that continued would fail every image.
fn lasting_fault_at(url: &str, error: &object_store::Error) -> Option<ImageFault> {
    use object_store::Error::{Generic, NotFound, NotSupported, PermissionDenied, Unauthenticated};
    let is_web = url.starts_with("http");
    let text = || error.to_string();
    let (code, message) = match error {
        NotFound { .. } => return Some(fault(&Trouble::Missing)),
        NotSupported { .. } => (
            GrpcCode::FailedPrecondition,
            "the server does not answer requests for a range of bytes, by which tar, Parquet and \
             Arrow files are read; download the file, or name it on another server"
                .to_owned(),
        ),
        PermissionDenied { .. } if text().contains("InvalidObjectState") => (
            GrpcCode::FailedPrecondition,
            "the object is in cold storage and must be restored before it can be read \
             (InvalidObjectState)"
                .to_owned(),
        ),
        _ if text().contains("BlobArchived") => (
            GrpcCode::FailedPrecondition,
            "the blob is in the archive tier and must be rehydrated before it can be read \
             (BlobArchived)"
                .to_owned(),
        ),
        PermissionDenied { .. } | Unauthenticated { .. } if is_web => {
            return Some(fault(&Trouble::Denied));
        }
        Generic { .. } if is_web => (GrpcCode::FailedPrecondition, refusal(&text())?),
        _ => return None,
    };
    Some(ImageFault { code, message })
}

/// Returns a sentence for a web server's answer 4xx, which will be the same the
/// next time.
fn refusal(text: &str) -> Option<String> {
    let (_, status) = text.split_once("non-2xx status code: ")?;
    let status = status.split(':').next().unwrap_or_default().trim();
    let is_lasting = status.starts_with('4') && !["408", "425", "429"].contains(&&status[..3]);
    is_lasting.then(|| format!("the server answered {status}"))
}

/// True if an input's or an output's error stays the same for the same command:
/// missing credentials or permissions, and buckets that do not exist.
pub(super) fn is_lasting(error: &object_store::Error) -> bool {
    use object_store::Error::{
        Generic, InvalidPath, NotFound, NotImplemented, NotSupported, PermissionDenied,
        Unauthenticated, UnknownConfigurationKey,
    };
    match error {
        NotFound { .. }
        | NotImplemented { .. }
        | NotSupported { .. }
        | InvalidPath { .. }
        | PermissionDenied { .. }
        | Unauthenticated { .. }
        | UnknownConfigurationKey { .. } => true,
        // A listing's answers have no kinds.
        Generic { source, .. } => {
            let text = source.to_string();
            let answered = |status: &str| text.contains(&format!("non-2xx status code: {status}"));
            source.is::<NoCredentials>() || ["401", "403", "404"].into_iter().any(answered)
        }
        _ => false,
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
    let odd = odd_key(&name);
    let trouble = odd.is_some().then(|| ImageFault {
        code: GrpcCode::InvalidArgument,
        message: "the key has a part that is empty, . or .., or a control character, and cannot \
                  be requested; copy the object to another key"
            .to_owned(),
    });
    ListedObject {
        name: odd.unwrap_or(name),
        bytes: meta.size,
        version: meta
            .e_tag
            .unwrap_or_else(|| meta.last_modified.timestamp_micros().to_string()),
        trouble,
        may_be_folder: false,
    }
}

fn found_entry(folder: &Path, found: FoundFile) -> ListedObject {
    let below = found.path.strip_prefix(folder).unwrap_or(&found.path);
    let name = name_as_text(below.as_os_str().as_encoded_bytes()).into_owned();
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

/// Makes the entry of a name that begins with a dot, which is only counted.
fn hidden_entry(folder: &Path, found: &HiddenEntry) -> ListedObject {
    let below = found.path.strip_prefix(folder).unwrap_or(&found.path);
    ListedObject {
        name: name_as_text(below.as_os_str().as_encoded_bytes()).into_owned(),
        bytes: 0,
        version: String::new(),
        trouble: None,
        may_be_folder: found.is_folder,
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
    async fn folders_are_listed_by_name_and_what_is_hidden_is_not_searched() {
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
        assert_eq!(names, [".hidden", "a/#1.png", "a/c.png", "b.png"]);
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
        let signed = "HTTPS://x/a/y.tar?X-Amz-Signature=1&version=2&sig=3#";
        let signed = Stores::default()
            .locate(signed.trim_end_matches('#'))
            .unwrap();
        assert_eq!(signed.to_string(), "https://x/a/y.tar?version=2");
        assert_eq!(signed.file_name(), "y.tar");
        for wrong in ["ftp://x/y", "https://x/y.tar#part"] {
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
        let ReadError::Refused(denied) = of("https://example.org/a.png") else {
            panic!("one file");
        };
        assert_eq!(denied.code, GrpcCode::PermissionDenied);
        assert!(matches!(of("s3://bucket/a.png"), ReadError::Store(_)));
        let cold = object_store::Error::PermissionDenied {
            path: "a.png".to_owned(),
            source: "403: <Code>InvalidObjectState</Code>".into(),
        };
        let ReadError::Refused(cold) = refused("s3://bucket/a.png", cold) else {
            panic!("one object");
        };
        assert!(cold.message.contains("cold storage"), "{}", cold.message);
    }

    #[test]
    fn paths_and_urls_are_told_apart_however_they_are_spelled() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for name in ["a b.png", "c%20d.png"] {
            std::fs::write(at(name), b"x").unwrap();
        }
        let root = dir.path().display();
        let path = |text: String| match Stores::default().locate(&text).unwrap() {
            Location::Local(path) => path,
            Location::Remote { url, .. } => panic!("{url}"),
        };
        for start in ["file:", "file://", "FILE://localhost", "File://LOCALHOST"] {
            assert_eq!(path(format!("{start}{root}/a%20b.png")), at("a b.png"));
            assert_eq!(path(format!("{start}{root}/a b.png")), at("a b.png"));
            assert_eq!(path(format!("{start}{root}/c%20d.png")), at("c%20d.png"));
        }
        assert_eq!(path(format!("{root}/a%20b.png")), at("a%20b.png"));
        for (text, scheme) in [
            ("S3://b/k", Some("s3")),
            ("file:/x", Some("file")),
            ("a:b.png", None),
            ("dir/http://x", None),
            ("C:/x", None),
        ] {
            assert_eq!(scheme_of(text).as_deref(), scheme, "{text}");
        }
        let list = Stores::default().locate("HTTP://127.0.0.1:1/a/b").unwrap();
        let joined = list.web_join("../c/./d e.png").unwrap();
        assert_eq!(joined.as_str(), "http://127.0.0.1:1/a/c/d%20e.png");
        assert!(list.checked_join("../c").is_err());
    }
}
