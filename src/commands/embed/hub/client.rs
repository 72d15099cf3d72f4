//! Calls of the Hugging Face Hub: commits, lists of files, and files by ranges.
//!
//! The user's token is sent to the hub's own origin and never to the hosts to
//! which the hub redirects. Answers that may pass (429, 5xx, no answer) are
//! asked again for a bounded time.

use std::ops::Range;
use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use bytes::Bytes;
use reqwest::header::{
    ACCEPT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, ETAG, HeaderMap, HeaderValue, LINK, RANGE,
};
use reqwest::{Method, StatusCode, Url};
use serde::Deserialize;

use super::HubRepository;
use crate::commands::embed::address::AddressBook;
use crate::commands::embed::connect::{CONNECT_TIMEOUT, REQUEST_TIMEOUT, RETRY_TIMEOUT};
use crate::commands::embed::web::{
    Failure, WebAnswer, WebClient, WebRequest, WebTimes, WebTrust, body, in_time, refused, repeated,
};
use crate::compile::hub::HubAccess;
use crate::proto::GrpcCode;

/// Address of the hub without `HF_ENDPOINT`.
const ENDPOINT: &str = "https://huggingface.co";
/// Largest answer of a call in bytes. A page of 1000 files has about 0.4 MB.
const ANSWER_BYTES_MAX: u64 = 16 << 20;
/// Pages of a list of files that are read. A page has up to 1000 files, and the
/// hub's own advice is to keep a repository below a hundred thousand.
const PAGES_MAX: usize = 2000;
/// Files of a list that are kept, with about 200 bytes each.
const FILES_MAX: usize = 1_000_000;
/// Largest file that is read whole because a server has no range of it: files
/// over 10 MiB are never stored without ranges.
const WHOLE_BYTES_MAX: u64 = 16 << 20;

/// Kind of a failed call, which decides the job's outcome.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::commands::embed) enum HubFailure {
    NoRepository,
    NoRevision,
    NoFile,
    /// The same call fails in the same way the next time.
    Lasting,
    /// The hub could not be asked this time.
    Passing,
}

/// Error of a call of the hub.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{text}")]
pub(in crate::commands::embed) struct HubError {
    pub(super) kind: HubFailure,
    text: String,
}

impl HubError {
    pub(super) fn new(kind: HubFailure, text: String) -> Self {
        Self { kind, text }
    }

    /// True if the same command fails in the same way the next time.
    pub(in crate::commands::embed) fn is_lasting(&self) -> bool {
        self.kind != HubFailure::Passing
    }
}

/// File of a repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct HubFile {
    /// Path from the repository's root.
    pub(super) path: String,
    pub(super) bytes: u64,
    /// Hash of the content, or the entity tag.
    pub(super) version: String,
}

/// Part of a file, with the size of the whole file.
#[derive(Debug)]
pub(super) struct HubBlock {
    pub(super) bytes: Bytes,
    pub(super) file_bytes: u64,
}

/// Entry of a page of `tree`.
#[derive(Debug, Deserialize)]
struct TreeEntry {
    #[serde(rename = "type")]
    kind: String,
    path: String,
    #[serde(default)]
    size: u64,
    #[serde(default)]
    oid: String,
    lfs: Option<TreePointer>,
}

/// Pointer that stands in git for a large file.
#[derive(Debug, Deserialize)]
struct TreePointer {
    oid: String,
    size: u64,
}

#[derive(Debug, Deserialize)]
struct RevisionInfo {
    sha: String,
}

/// Answer of the hub, or of a host to which it redirected.
struct HubAnswer {
    status: StatusCode,
    headers: HeaderMap,
    body: Bytes,
    url: Url,
    /// True if the hub itself answered.
    is_home: bool,
}

impl HubAnswer {
    fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }
}

/// Client of a hub.
#[derive(Debug)]
pub(super) struct HubClient {
    web: WebClient,
    endpoint: Url,
    authorization: Option<HeaderValue>,
    patience: Duration,
}

impl HubClient {
    /// Makes the client of the hub that the environment names.
    pub(super) fn new(access: HubAccess) -> anyhow::Result<Self> {
        let HubAccess { endpoint, token } = access;
        let endpoint = endpoint.as_deref().unwrap_or(ENDPOINT);
        let endpoint = Url::parse(endpoint)
            .ok()
            .filter(|url| matches!(url.scheme(), "http" | "https"))
            .with_context(|| {
                format!("HF_ENDPOINT {endpoint} is not a URL that begins with http:// or https://")
            })?;
        let secret = |token: String| {
            let mut value = HeaderValue::try_from(format!("Bearer {token}"))
                .map_err(|_| anyhow::anyhow!("HF_TOKEN contains characters that no token has"))?;
            value.set_sensitive(true);
            anyhow::Ok(value)
        };
        let times = WebTimes {
            connect: CONNECT_TIMEOUT,
            request: REQUEST_TIMEOUT,
        };
        Ok(Self {
            // The flags about addresses are about the URLs of lists.
            web: WebClient::new(WebTrust::default(), times, AddressBook::default())?,
            endpoint,
            authorization: token.map(secret).transpose()?,
            patience: RETRY_TIMEOUT,
        })
    }

    #[cfg(test)]
    pub(super) fn with_patience(self, patience: Duration) -> Self {
        Self { patience, ..self }
    }

    fn url<'a>(&self, parts: impl IntoIterator<Item = &'a str>) -> Url {
        let mut url = self.endpoint.clone();
        // The URL's scheme is http or https, so it has a path.
        if let Ok(mut path) = url.path_segments_mut() {
            path.pop_if_empty().extend(parts);
        }
        url
    }

    fn request(&self, method: Method) -> WebRequest {
        let mut headers = HeaderMap::new();
        // Sizes are those of the files only if nothing is compressed.
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        WebRequest {
            at_home: method == Method::HEAD,
            method,
            headers,
            secret: self.authorization.clone(),
        }
    }

    /// Sends a request for as long as its failure may pass. Answers of every
    /// other status are returned; the body is read only if the status is a
    /// success.
    async fn call(
        &self,
        url: &Url,
        request: &WebRequest,
        body_max: u64,
    ) -> Result<HubAnswer, HubError> {
        let once = || async {
            let response = self.web.follow(url, request).await?;
            let status = response.status();
            if matches!(status.as_u16(), 408 | 429 | 500..) {
                return Err(refused(status, response.headers(), SystemTime::now()));
            }
            let headers = response.headers().clone();
            let from = response.url().clone();
            let body = if status.is_success() && request.method != Method::HEAD {
                body(response, body_max).await?
            } else {
                WebAnswer::Image(Bytes::new())
            };
            Ok((status, headers, from, body))
        };
        let answer = repeated(self.patience, || in_time(&self.web, once())).await;
        let (status, headers, from, body) = answer.map_err(|failure| self.unanswered(failure))?;
        let WebAnswer::Image(body) = body else {
            return Err(HubError::new(
                HubFailure::Lasting,
                format!("{from} answered more than {body_max} bytes, the limit of such an answer"),
            ));
        };
        Ok(HubAnswer {
            status,
            headers,
            body,
            is_home: from.origin() == self.endpoint.origin(),
            url: from,
        })
    }

    fn unanswered(&self, failure: Failure) -> HubError {
        let endpoint = &self.endpoint;
        match failure {
            Failure::Passing(fault, _) => HubError::new(
                HubFailure::Passing,
                format!(
                    "the hub {endpoint}: {}, also after retries for {}",
                    fault.message,
                    humantime::format_duration(self.patience)
                ),
            ),
            // A host whose name is unknown is known again with a network.
            Failure::Lasting(fault) if fault.code == GrpcCode::NotFound => HubError::new(
                HubFailure::Passing,
                format!("the hub {endpoint}: {} (HF_ENDPOINT)", fault.message),
            ),
            Failure::Lasting(fault) => HubError::new(
                HubFailure::Lasting,
                format!("the hub {endpoint}: {}", fault.message),
            ),
        }
    }

    /// Describes an answer that is neither a success nor may pass.
    fn refusal(&self, answer: &HubAnswer, repository: &HubRepository, what: &str) -> HubError {
        let name = &repository.name;
        let status = answer.status;
        let endpoint = &self.endpoint;
        let remedy = if self.authorization.is_some() {
            "the token of HF_TOKEN may not read it"
        } else {
            "set HF_TOKEN to a token that may read it"
        };
        let (kind, text) = match (answer.header("x-error-code"), status.as_u16()) {
            (Some("GatedRepo"), _) => (
                HubFailure::Lasting,
                format!(
                    "the dataset {name} is gated: accept its conditions at {}, and set HF_TOKEN \
                     to a token of the same account",
                    self.url(["datasets"].into_iter().chain(name.split('/')))
                ),
            ),
            (Some("RepoNotFound"), _) => (
                HubFailure::NoRepository,
                format!("{endpoint} has no dataset {name}, or it is private: {remedy}"),
            ),
            (Some("RevisionNotFound"), _) => (
                HubFailure::NoRevision,
                format!("the dataset {name} has no revision {}", repository.revision),
            ),
            (Some("EntryNotFound"), _) => (
                HubFailure::NoFile,
                format!("the dataset {name} has no {what}"),
            ),
            // The storage's own reasons are not the hub's.
            (_, 400..) if !answer.is_home => (
                HubFailure::Passing,
                format!(
                    "{what} of the dataset {name}: {}, to which the hub redirects, answered \
                     {status}",
                    answer.url.origin().ascii_serialization()
                ),
            ),
            (_, 401) => (
                HubFailure::NoRepository,
                format!("{endpoint} has no dataset {name}, or it is private: {remedy}"),
            ),
            (_, 403) => (
                HubFailure::Lasting,
                format!("the dataset {name} may not be read: {remedy}"),
            ),
            (_, 404 | 410) => (
                HubFailure::NoFile,
                format!("the dataset {name} has no {what}"),
            ),
            _ => (
                HubFailure::Lasting,
                format!("the hub {endpoint} answered {status} for {what} of the dataset {name}"),
            ),
        };
        HubError::new(kind, text)
    }

    /// Returns the commit that a revision is now.
    pub(super) async fn commit(&self, repository: &HubRepository) -> Result<String, HubError> {
        let parts = ["api", "datasets"].into_iter();
        let parts = parts.chain(repository.name.split('/'));
        let mut url = self.url(parts.chain(["revision", &repository.revision]));
        // Without the list of all files, which the hub sends otherwise.
        url.set_query(Some("expand=sha"));
        let request = self.request(Method::GET);
        let answer = self.call(&url, &request, ANSWER_BYTES_MAX).await?;
        if !answer.status.is_success() {
            let what = format!("revision {}", repository.revision);
            return Err(self.refusal(&answer, repository, &what));
        }
        let info: RevisionInfo = parsed(&answer)?;
        let is_commit = info.sha.len() == 40 && info.sha.bytes().all(|b| b.is_ascii_hexdigit());
        if !is_commit {
            let text = format!("{url} answered a commit that is not 40 hexadecimal digits");
            return Err(HubError::new(HubFailure::Lasting, text));
        }
        Ok(info.sha)
    }

    /// Lists the files below a directory of a commit for which `wanted` is true.
    pub(super) async fn files(
        &self,
        repository: &HubRepository,
        commit: &str,
        folder: &str,
        wanted: impl Fn(&str) -> bool,
    ) -> Result<Vec<HubFile>, HubError> {
        let parts = ["api", "datasets"].into_iter();
        let parts = parts.chain(repository.name.split('/'));
        let parts = parts.chain(["tree", commit]);
        let mut url = self.url(parts.chain(folder.split('/').filter(|part| !part.is_empty())));
        url.set_query(Some("recursive=true&expand=false"));
        let request = self.request(Method::GET);
        let mut found = Vec::new();
        for _ in 0..PAGES_MAX {
            let answer = self.call(&url, &request, ANSWER_BYTES_MAX).await?;
            if !answer.status.is_success() {
                let what = if folder.is_empty() {
                    format!("commit {commit}")
                } else {
                    format!("file or directory {folder}")
                };
                return Err(self.refusal(&answer, repository, &what));
            }
            let page: Vec<TreeEntry> = parsed(&answer)?;
            let files = page
                .into_iter()
                .filter(|entry| entry.kind == "file" && wanted(&entry.path));
            found.extend(files.map(|entry| {
                let (version, bytes) = match entry.lfs {
                    Some(pointer) => (pointer.oid, pointer.size),
                    None => (entry.oid, entry.size),
                };
                HubFile {
                    path: entry.path,
                    bytes,
                    version,
                }
            }));
            if found.len() > FILES_MAX {
                break;
            }
            let links = answer.headers.get_all(LINK).iter();
            let mut links = links.filter_map(|link| next_page(link.to_str().ok()?));
            let Some(next) = links.next() else {
                return Ok(found);
            };
            url = answer
                .url
                .join(&next)
                .ok()
                .filter(|next| next.origin() == self.endpoint.origin())
                .ok_or_else(|| {
                    let text = format!("{url} names a next page that is not a page of the hub");
                    HubError::new(HubFailure::Lasting, text)
                })?;
        }
        Err(HubError::new(
            HubFailure::Lasting,
            format!(
                "the dataset {} lists over {FILES_MAX} files or {PAGES_MAX} pages; name a \
                 directory of it",
                repository.name
            ),
        ))
    }

    fn file_url(&self, repository: &HubRepository, commit: &str, path: &str) -> Url {
        let parts = ["datasets"].into_iter();
        let parts = parts.chain(repository.name.split('/'));
        self.url(parts.chain(["resolve", commit]).chain(path.split('/')))
    }

    /// Returns the facts about a file without its content.
    pub(super) async fn file(
        &self,
        repository: &HubRepository,
        commit: &str,
        path: &str,
    ) -> Result<HubFile, HubError> {
        let url = self.file_url(repository, commit, path);
        let answer = self.call(&url, &self.request(Method::HEAD), 0).await?;
        if !answer.status.is_success() && !answer.status.is_redirection() {
            return Err(self.refusal(&answer, repository, &format!("file {path}")));
        }
        // A file in the hub's storage is redirected to, and described by the
        // linked headers.
        let length = answer.header("x-linked-size");
        let length = length.or_else(|| answer.header(CONTENT_LENGTH.as_str()));
        let bytes = length.and_then(|length| length.parse().ok());
        let version = answer.header("x-linked-etag");
        let version = version.or_else(|| answer.header(ETAG.as_str()));
        let version = version.unwrap_or_default().trim_start_matches("W/");
        Ok(HubFile {
            path: path.to_owned(),
            bytes: bytes.ok_or_else(|| {
                let text = format!("{url}: the hub states no size of the file");
                HubError::new(HubFailure::Lasting, text)
            })?,
            version: version.trim_matches('"').to_owned(),
        })
    }

    /// Reads a range of a file; a range beyond the end is cut off there.
    pub(super) async fn block(
        &self,
        repository: &HubRepository,
        commit: &str,
        path: &str,
        range: Range<u64>,
    ) -> Result<HubBlock, HubError> {
        let url = self.file_url(repository, commit, path);
        let wrong = |what: &str| {
            let (start, end) = (range.start, range.end);
            let text = format!("{url}: bytes {start}..{end}: {what}");
            HubError::new(HubFailure::Passing, text)
        };
        let mut request = self.request(Method::GET);
        let wanted = format!("bytes={}-{}", range.start, range.end.saturating_sub(1));
        let wanted = HeaderValue::try_from(wanted).map_err(|error| wrong(&error.to_string()))?;
        request.headers.insert(RANGE, wanted);
        let body_max = WHOLE_BYTES_MAX.max(range.end.saturating_sub(range.start));
        let answer = self.call(&url, &request, body_max).await?;
        let stated = answer
            .header(CONTENT_RANGE.as_str())
            .and_then(content_range);
        match (answer.status.as_u16(), stated) {
            (206, Some((Some(start), file_bytes))) => {
                let end = range.end.min(file_bytes);
                if start != range.start || answer.body.len() as u64 != end.saturating_sub(start) {
                    return Err(wrong("the answer has other bytes"));
                }
                Ok(HubBlock {
                    bytes: answer.body,
                    file_bytes,
                })
            }
            // The range begins at the end of the file or after it.
            (416, Some((None, file_bytes))) if range.start >= file_bytes => Ok(HubBlock {
                bytes: Bytes::new(),
                file_bytes,
            }),
            (200, _) => {
                let file_bytes = answer.body.len() as u64;
                let place = |at: u64| usize::try_from(at.min(file_bytes)).unwrap_or_default();
                Ok(HubBlock {
                    bytes: answer.body.slice(place(range.start)..place(range.end)),
                    file_bytes,
                })
            }
            (206, _) => Err(wrong("the answer states no range")),
            _ => Err(self.refusal(&answer, repository, &format!("file {path}"))),
        }
    }
}

fn parsed<'a, T: Deserialize<'a>>(answer: &'a HubAnswer) -> Result<T, HubError> {
    serde_json::from_slice(&answer.body).map_err(|error| {
        let text = format!("{} is not an answer of the hub: {error}", answer.url);
        HubError::new(HubFailure::Lasting, text)
    })
}

/// Parses `Content-Range`: the first byte, if the header has one, and the size
/// of the whole file.
fn content_range(text: &str) -> Option<(Option<u64>, u64)> {
    let (range, bytes) = text.trim().strip_prefix("bytes ")?.split_once('/')?;
    let start = match range.split_once('-') {
        Some((start, _)) => Some(start.parse().ok()?),
        None => None,
    };
    Some((start, bytes.parse().ok()?))
}

/// Returns the target of the link to the next page.
fn next_page(links: &str) -> Option<String> {
    // A target may contain commas and semicolons, and no bracket.
    links.split('<').skip(1).find_map(|link| {
        let (target, parameters) = link.split_once('>')?;
        let is_next = parameters.split([';', ',']).any(|parameter| {
            let (name, value) = parameter.split_once('=').unwrap_or((parameter, ""));
            name.trim().eq_ignore_ascii_case("rel") && value.trim().trim_matches('"') == "next"
        });
        is_next.then(|| target.to_owned())
    })
}

#[cfg(test)]
mod tests;
