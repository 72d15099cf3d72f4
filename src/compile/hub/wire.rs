//! Requests to a hub, each of whose steps has a time limit.
//!
//! The user's token is sent to the hub's own origin and never to the hosts to
//! which the hub redirects.

use std::io::Read;

use http::header::{
    ACCEPT_ENCODING, AUTHORIZATION, CONTENT_LENGTH, CONTENT_RANGE, ETAG, LOCATION, RANGE,
};
use http::{HeaderMap, StatusCode, Uri};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde::Deserialize;
use ureq::{Agent, Body, Error, Timeout};

use super::{DOWNLOAD_TIMEOUT, ETAG_TIMEOUT, Hub, HubTimes};
use crate::compile::error::CompileError;

/// Address of the hub without `HF_ENDPOINT`.
const ENDPOINT: &str = "https://huggingface.co";
/// Characters that are escaped in a part of a path, as `huggingface_hub` does.
const PART: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'_')
    .remove(b'.')
    .remove(b'~');
/// Largest description of a repository in bytes; a thousand files take 0.1 MB.
const INFO_BYTES_MAX: u64 = 16 << 20;
/// Redirects that are followed for one URL; more are a redirect loop.
const REDIRECTS_MAX: usize = 10;
/// Longest name of a file of the cache, as file systems have it, less the
/// longest suffix.
const BLOB_BYTES_MAX: usize = 250;

/// Reason why files of a hub are not there.
#[derive(Debug)]
pub(super) enum HubTrouble {
    /// The hub cannot be used now: no connection, no answer in time, or an
    /// answer that says so.
    Absent(String),
    /// The hub does not have the files, or does not give them to this user.
    Refused(String),
    /// A file cannot be written or read here.
    Here(CompileError),
}

impl From<CompileError> for HubTrouble {
    fn from(error: CompileError) -> Self {
        Self::Here(error)
    }
}

/// Model of a hub at a revision.
#[derive(Debug, Clone, Copy)]
pub(super) struct HubModel<'a> {
    /// Name with its owner. It is valid in a URL and in a path, since
    /// `ModelSource::parse` takes no other.
    pub(super) name: &'a str,
    pub(super) revision: &'a str,
}

/// Answer of the hub about a repository at a revision.
#[derive(Debug, Deserialize)]
pub(super) struct RepositoryInfo {
    #[serde(rename = "sha")]
    pub(super) commit: String,
    #[serde(default)]
    siblings: Vec<RepositoryFile>,
}

#[derive(Debug, Deserialize)]
struct RepositoryFile {
    rfilename: String,
}

impl RepositoryInfo {
    pub(super) fn has(&self, name: &str) -> bool {
        self.siblings.iter().any(|file| file.rfilename == name)
    }
}

/// Size of a file and its name among the cache's blobs.
#[derive(Debug)]
pub(super) struct BlobFacts {
    pub(super) name: String,
    pub(super) bytes: u64,
}

/// Content of a file from a place on.
pub(super) struct BlobContent {
    /// Offset of the first byte.
    pub(super) start: u64,
    pub(super) content: Box<dyn Read>,
}

/// Answer of the hub, or of a host to which it redirected.
struct WireAnswer {
    status: StatusCode,
    headers: HeaderMap,
    body: Body,
    uri: Uri,
    /// Headers of the hub's own last answer, which describe a file that is
    /// stored elsewhere.
    own: HeaderMap,
}

/// Client of a hub.
#[derive(Debug)]
pub(super) struct HubWire {
    /// Client of answers that are short, each of which has a time limit.
    asks: Agent,
    /// Client of files, whose pauses have a time limit.
    reads: Agent,
    endpoint: String,
    home: Uri,
    token: Option<String>,
    times: HubTimes,
}

impl HubWire {
    pub(super) fn new(hub: &Hub) -> Result<Self, CompileError> {
        let endpoint = hub.endpoint.as_deref().unwrap_or(ENDPOINT);
        let endpoint = endpoint.trim_end_matches('/').to_owned();
        let home = endpoint.parse::<Uri>().ok();
        let home = home.filter(|uri| matches!(uri.scheme_str(), Some("http" | "https")));
        let home = home.ok_or_else(|| {
            CompileError::Options(format!(
                "HF_ENDPOINT is {endpoint:?}; it must be a URL that begins with http:// or https://"
            ))
        })?;
        let times = hub.times;
        let config = || {
            Agent::config_builder()
                .user_agent(concat!("imagegpt/", env!("CARGO_PKG_VERSION")))
                // The target of each redirect is looked at first.
                .max_redirects(0)
                .max_redirects_will_error(false)
                .http_status_as_error(false)
                .timeout_resolve(Some(times.answer))
                .timeout_connect(Some(times.answer))
                .timeout_send_request(Some(times.answer))
                .timeout_recv_response(Some(times.answer))
        };
        Ok(Self {
            asks: config().timeout_global(Some(times.answer)).build().into(),
            reads: config().timeout_per_read(Some(times.pause)).build().into(),
            endpoint,
            home,
            token: hub.token.clone(),
            times,
        })
    }

    /// Asks for the commit of a revision and its files.
    pub(super) fn info(&self, at: HubModel<'_>) -> Result<RepositoryInfo, HubTrouble> {
        let (name, revision) = (at.name, utf8_percent_encode(at.revision, PART));
        let url = format!("{}/api/models/{name}/revision/{revision}", self.endpoint);
        let mut answer = self.send(&self.asks, &url, None)?;
        if !answer.status.is_success() {
            return Err(self.refusal(&answer, at, None));
        }
        let body = answer.body.with_config().limit(INFO_BYTES_MAX);
        let body = body.read_to_vec().map_err(|error| self.unanswered(error))?;
        let info: RepositoryInfo = serde_json::from_slice(&body).map_err(|error| {
            HubTrouble::Refused(format!("{url} is not an answer of a hub: {error}"))
        })?;
        // The commit becomes the name of a directory.
        if !is_commit(&info.commit) {
            return Err(HubTrouble::Refused(format!(
                "{url} answered a commit that is not 40 hexadecimal digits"
            )));
        }
        Ok(info)
    }

    pub(super) fn file_url(&self, at: HubModel<'_>, commit: &str, name: &str) -> String {
        let (model, name) = (at.name, utf8_percent_encode(name, PART));
        format!("{}/{model}/resolve/{commit}/{name}", self.endpoint)
    }

    /// Asks for the facts about a file, by its first byte: some hubs have no
    /// answer to a request for the facts alone.
    pub(super) fn facts(
        &self,
        at: HubModel<'_>,
        url: &str,
        name: &str,
    ) -> Result<BlobFacts, HubTrouble> {
        let answer = self.send(&self.asks, url, Some("bytes=0-0"))?;
        // The one byte of an empty file is beyond its end.
        let is_answer = answer.status.is_success() || answer.status.as_u16() == 416;
        if !is_answer {
            return Err(self.refusal(&answer, at, Some(name)));
        }
        let header = |name: &str| answer.own.get(name)?.to_str().ok();
        let tag = header("x-linked-etag").or_else(|| header(ETAG.as_str()));
        let tag = tag.unwrap_or_default().trim_start_matches("W/");
        let tag = tag.trim_matches('"');
        // The tag becomes the name of a file.
        let is_name = (1..=BLOB_BYTES_MAX).contains(&tag.len())
            && !tag.starts_with('.')
            && tag
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
        if !is_name {
            return Err(HubTrouble::Refused(format!(
                "{url} has the entity tag {tag:?}, which is not the name of a file"
            )));
        }
        let length = answer.headers.get(CONTENT_LENGTH);
        let length = length.filter(|_| answer.status.as_u16() == 200);
        let bytes = range_of(&answer.headers).map(|(_, bytes)| bytes);
        let bytes = bytes.or_else(|| length?.to_str().ok()?.parse().ok());
        let bytes = bytes
            .ok_or_else(|| HubTrouble::Refused(format!("{url}: the hub states no size of it")))?;
        Ok(BlobFacts {
            name: tag.to_owned(),
            bytes,
        })
    }

    /// Begins to read a file at an offset, or at its beginning if the server
    /// has no ranges.
    pub(super) fn content(
        &self,
        at: HubModel<'_>,
        url: &str,
        name: &str,
        start: u64,
    ) -> Result<BlobContent, HubTrouble> {
        let answer = self.send(&self.reads, url, Some(&format!("bytes={start}-")))?;
        let start = match (answer.status.as_u16(), range_of(&answer.headers)) {
            (206, Some((Some(first), _))) if first == start => start,
            (206, _) => {
                let text = format!("{url}: the answer has other bytes than those from {start} on");
                return Err(HubTrouble::Absent(text));
            }
            (200, _) => 0,
            _ => return Err(self.refusal(&answer, at, Some(name))),
        };
        Ok(BlobContent {
            start,
            content: Box::new(answer.body.into_reader()),
        })
    }

    /// Sends a request, and follows redirects until an answer is none.
    fn send(
        &self,
        agent: &Agent,
        url: &str,
        range: Option<&str>,
    ) -> Result<WireAnswer, HubTrouble> {
        let wrong = |what: &str| HubTrouble::Refused(format!("{url}: {what}"));
        let mut uri = url
            .parse::<Uri>()
            .map_err(|error| wrong(&error.to_string()))?;
        let mut own = HeaderMap::new();
        for _ in 0..=REDIRECTS_MAX {
            let is_home = is_same_origin(&uri, &self.home);
            let mut request = agent.get(&uri).header(ACCEPT_ENCODING, "identity");
            if let Some(range) = range {
                request = request.header(RANGE, range);
            }
            if let Some(token) = self.token.as_ref().filter(|_| is_home) {
                request = request.header(AUTHORIZATION, format!("Bearer {token}"));
            }
            let answer = request.call().map_err(|error| self.unanswered(error))?;
            let (parts, body) = answer.into_parts();
            if is_home {
                own = parts.headers.clone();
            }
            let target = parts.headers.get(LOCATION).and_then(|to| to.to_str().ok());
            let target = target.filter(|_| matches!(parts.status.as_u16(), 301..=303 | 307 | 308));
            let Some(target) = target else {
                if matches!(parts.status.as_u16(), 408 | 429 | 500..) {
                    let text = format!("{} answered {}", origin(&uri), parts.status);
                    return Err(HubTrouble::Absent(text));
                }
                return Ok(WireAnswer {
                    status: parts.status,
                    headers: parts.headers,
                    body,
                    uri,
                    own,
                });
            };
            uri = joined(&uri, target)
                .ok_or_else(|| wrong(&format!("the redirect to {target:?} is not a URL")))?;
        }
        Err(wrong(&format!("redirects more than {REDIRECTS_MAX} times")))
    }

    /// Describes an answer that is neither a success nor may pass.
    fn refusal(&self, answer: &WireAnswer, at: HubModel<'_>, file: Option<&str>) -> HubTrouble {
        let status = answer.status;
        if !is_same_origin(&answer.uri, &self.home) {
            // The storage's own reasons are not the hub's.
            return HubTrouble::Absent(format!(
                "{}, to which the hub redirects, answered {status}",
                origin(&answer.uri)
            ));
        }
        let (endpoint, name) = (&self.endpoint, at.name);
        let remedy = if self.token.is_some() {
            "the token of HF_TOKEN may not read it"
        } else {
            "set HF_TOKEN to a token that may read it"
        };
        let code = answer.headers.get("x-error-code");
        let code = code.and_then(|code| code.to_str().ok());
        HubTrouble::Refused(match (code, status.as_u16(), file) {
            (Some("GatedRepo"), ..) => format!(
                "the model is gated ({status}): accept its conditions at {endpoint}/{name}, and \
                 set HF_TOKEN to a token of the same account"
            ),
            (Some("RevisionNotFound"), ..) => format!(
                "{endpoint} has no revision {} of the model ({status}); name another one with \
                 --revision",
                at.revision
            ),
            (_, 404 | 410, Some(file)) => format!("the repository has no {file} ({status})"),
            (Some("RepoNotFound"), ..) | (_, 401 | 404 | 410, _) => {
                format!("{endpoint} has no such model, or it is private ({status}): {remedy}")
            }
            (_, 403, _) => format!("the model may not be read ({status}): {remedy}"),
            _ => format!("{} answered {status}", answer.uri),
        })
    }

    /// Describes a request that has no answer.
    pub(super) fn unanswered(&self, error: Error) -> HubTrouble {
        let endpoint = &self.endpoint;
        let HubTimes { answer, pause } = self.times;
        let answer = humantime::format_duration(answer);
        let text = match error {
            Error::BadUri(what) => {
                return HubTrouble::Refused(format!("{what} is not a URL (HF_ENDPOINT)"));
            }
            Error::InvalidProxyUrl => {
                return HubTrouble::Refused(
                    "the proxy's address is not a URL (HTTPS_PROXY, HTTP_PROXY, ALL_PROXY)"
                        .to_owned(),
                );
            }
            Error::Timeout(Timeout::PerRead) => format!(
                "the hub {endpoint} sent nothing for {} ({DOWNLOAD_TIMEOUT})",
                humantime::format_duration(pause)
            ),
            Error::Timeout(Timeout::Resolve) => {
                format!(
                    "the name of the hub {endpoint} has no address after {answer} ({ETAG_TIMEOUT})"
                )
            }
            Error::Timeout(Timeout::Connect) => {
                format!("the hub {endpoint} accepts no connection within {answer} ({ETAG_TIMEOUT})")
            }
            Error::Timeout(_) => {
                format!("the hub {endpoint} does not answer within {answer} ({ETAG_TIMEOUT})")
            }
            error => format!("the hub {endpoint} cannot be reached: {error}"),
        };
        HubTrouble::Absent(text)
    }
}

/// Returns true for the full name of a commit.
pub(super) fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|b| b.is_ascii_hexdigit())
}

fn origin(uri: &Uri) -> String {
    let scheme = uri.scheme_str().unwrap_or_default();
    format!(
        "{scheme}://{}",
        uri.authority().map_or("", |host| host.as_str())
    )
}

fn is_same_origin(a: &Uri, b: &Uri) -> bool {
    let port = |uri: &Uri| {
        let default = if uri.scheme_str() == Some("https") {
            443
        } else {
            80
        };
        uri.port_u16().unwrap_or(default)
    };
    let host = |uri: &Uri| uri.host().map(str::to_ascii_lowercase);
    a.scheme_str() == b.scheme_str() && host(a) == host(b) && port(a) == port(b)
}

/// Returns the target of a redirect: a URL, or a path from the host's root.
fn joined(uri: &Uri, target: &str) -> Option<Uri> {
    let target = target.split('#').next()?;
    if target.starts_with('/') && !target.starts_with("//") {
        let mut parts = uri.clone().into_parts();
        parts.path_and_query = Some(target.parse().ok()?);
        return Uri::from_parts(parts).ok();
    }
    let target = target.parse::<Uri>().ok()?;
    matches!(target.scheme_str(), Some("http" | "https")).then_some(target)
}

/// Parses `Content-Range`: the first byte, if the header has one, and the size
/// of the whole file.
fn range_of(headers: &HeaderMap) -> Option<(Option<u64>, u64)> {
    let text = headers.get(CONTENT_RANGE)?.to_str().ok()?;
    let (range, bytes) = text.trim().strip_prefix("bytes ")?.split_once('/')?;
    let start = match range.split_once('-') {
        Some((start, _)) => Some(start.parse().ok()?),
        None => None,
    };
    Some((start, bytes.parse().ok()?))
}
