//! Download of images that a list names by URL. A server's answer for a URL
//! decides only that image's outcome: among a million URLs some are dead, and
//! the job goes on.
//!
//! Failures that may pass (a server that is busy, unavailable or slow) are
//! retried for a while with exponential backoff. Failures that last (a URL that
//! does not exist or is forbidden, an unknown host) are errors at once.

use std::error::Error as _;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use backon::{BackoffBuilder as _, ExponentialBuilder};
use bytes::Bytes;
use hyper_util::client::proxy::matcher::Matcher;
use reqwest::header::{
    AUTHORIZATION, CONTENT_ENCODING, HeaderMap, HeaderValue, LOCATION, RETRY_AFTER,
};
use reqwest::{Client, Method, Response, StatusCode, Url, redirect};
use tokio::time::Instant;

use super::address::{AddressBook, AddressRefused, AddressRule, AddressScope, RuledNames};
use super::encoding::{BodyDecoder, BodyRefused};
use crate::client::pool::ImageFault;
use crate::proto::GrpcCode;

/// First rest between attempts; the rests after it double.
const REST_MIN: Duration = Duration::from_millis(500);
/// Exponential backoff between attempts, up to the longest rest.
const RESTS: ExponentialBuilder = ExponentialBuilder::new()
    .with_min_delay(REST_MIN)
    .with_max_delay(Duration::from_secs(10))
    .without_max_times();
/// Longest rest that is accepted from a server's `Retry-After`: the largest
/// value of `--url-patience`, so that a longer rest would mean never.
const RETRY_AFTER_MAX: Duration = Duration::from_hours(24);
/// Redirects that are followed for one URL, a bound like that of browsers and
/// curl; more are a redirect loop.
const REDIRECTS_MAX: usize = 10;
/// User agent of each request, since some servers answer no request without
/// one.
const USER_AGENT: &str = concat!("imagegpt/", env!("CARGO_PKG_VERSION"));

/// Answer of a server for a URL.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum WebAnswer {
    Image(Bytes),
    /// The image has at least this number of bytes, which is over the limit.
    TooLarge(u64),
}

/// Failure that keeps an image from being read.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Failure {
    Lasting(ImageFault),
    /// Failure that may pass, with the rest that the server asks for.
    Passing(ImageFault, Option<Duration>),
}

/// Request that is sent to a URL, and to the URLs to which it is redirected.
#[derive(Debug, Clone, Default)]
pub(super) struct WebRequest {
    pub(super) method: Method,
    pub(super) headers: HeaderMap,
    /// Value of `Authorization`. It is sent to the origin of the first URL
    /// only: no redirect carries it to another host, port or scheme.
    pub(super) secret: Option<HeaderValue>,
    /// True if a redirect to another origin is an answer, which is not
    /// followed.
    pub(super) at_home: bool,
}

/// Addresses that the flags allow to the URLs of a list.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct WebTrust {
    /// True with `--link-local-addresses`.
    pub(super) link_local: bool,
    /// True with `--public-addresses-only`.
    pub(super) public_only: bool,
}

/// Time limits for a server.
#[derive(Debug, Clone, Copy)]
pub(super) struct WebTimes {
    pub(super) connect: Duration,
    /// Limit for one attempt with all its redirects.
    pub(super) request: Duration,
}

/// HTTP client for all servers. Each address rule has connections of its own,
/// so that a connection to an address that only the list may name is never
/// reused for a redirect from a public address.
#[derive(Debug)]
pub(super) struct WebClient {
    named: Client,
    public: Client,
    /// Client for requests through a proxy, which looks host names up itself.
    proxied: Client,
    proxies: Matcher,
    book: AddressBook,
    trust: WebTrust,
    times: WebTimes,
}

impl WebClient {
    /// Makes the HTTP clients: one per address rule, and one for proxies.
    ///
    /// # Errors
    ///
    /// When the process cannot make an HTTP client.
    pub(super) fn new(
        trust: WebTrust,
        times: WebTimes,
        book: AddressBook,
    ) -> reqwest::Result<Self> {
        // Whichever of the two TLS libraries comes first installs the provider.
        let _ = tokio_rustls::rustls::crypto::ring::default_provider().install_default();
        let builder = || {
            Client::builder()
                .user_agent(USER_AGENT)
                .connect_timeout(times.connect)
                .timeout(times.request)
                // Each redirect is checked before it is followed.
                .redirect(redirect::Policy::none())
        };
        let ruled = |rule| {
            let book = book.clone();
            let names = RuledNames { book, rule };
            builder().no_proxy().dns_resolver(Arc::new(names)).build()
        };
        Ok(Self {
            named: ruled(AddressRule::Named {
                link_local: trust.link_local,
            })?,
            public: ruled(AddressRule::Public)?,
            proxied: builder().build()?,
            // Reads the same environment variables as reqwest.
            proxies: Matcher::from_system(),
            book,
            trust,
            times,
        })
    }

    /// Returns the rule for the URLs that a list names itself.
    fn first_rule(&self) -> AddressRule {
        if self.trust.public_only {
            AddressRule::Public
        } else {
            AddressRule::Named {
                link_local: self.trust.link_local,
            }
        }
    }

    fn goes_through_a_proxy(&self, url: &Url) -> bool {
        let uri = url.as_str().parse::<http::Uri>();
        uri.is_ok_and(|uri| self.proxies.intercept(&uri).is_some())
    }

    /// Sends one request, to an address that the rule allows. `secret` is true
    /// if the request's secret may be sent there.
    async fn ask(
        &self,
        url: &Url,
        rule: AddressRule,
        request: &WebRequest,
        secret: bool,
    ) -> Result<Response, Unasked> {
        self.book.check_literal(rule, url)?;
        let client = if self.goes_through_a_proxy(url) {
            &self.proxied
        } else if rule == AddressRule::Public {
            &self.public
        } else {
            &self.named
        };
        let mut asked = client
            .request(request.method.clone(), url.clone())
            .headers(request.headers.clone());
        if let Some(value) = request.secret.clone().filter(|_| secret) {
            asked = asked.header(AUTHORIZATION, value);
        }
        asked.send().await.map_err(|error| {
            let causes = std::iter::successors(error.source(), |&cause| cause.source());
            let refused = causes.filter_map(|cause| cause.downcast_ref::<AddressRefused>());
            match refused.copied().next() {
                Some(refused) => Unasked::Refused(refused),
                None => Unasked::Unanswered(error),
            }
        })
    }

    /// Returns the rule for the target of this answer's redirect. A public
    /// address, or an address that is unknown because of a proxy, does not
    /// speak for the list, so its targets must be public.
    fn next_rule(&self, rule: AddressRule, url: &Url, response: &Response) -> AddressRule {
        let peer = response.remote_addr().map(|peer| peer.ip());
        let scope = peer.map(|peer| (self.book.scope)(peer));
        match scope {
            Some(AddressScope::Private | AddressScope::LinkLocal)
                if !self.goes_through_a_proxy(url) =>
            {
                rule
            }
            _ => AddressRule::Public,
        }
    }

    /// Sends the request, and follows redirects until an answer is none.
    pub(super) async fn follow(
        &self,
        first: &Url,
        request: &WebRequest,
    ) -> Result<Response, Failure> {
        let mut rule = self.first_rule();
        let mut url = first.clone();
        let mut from = None;
        for _ in 0..=REDIRECTS_MAX {
            let is_home = url.origin() == first.origin();
            let response = match self.ask(&url, rule, request, is_home).await {
                Ok(response) => response,
                Err(Unasked::Refused(refused)) => {
                    let fault = self.fault_of_address(&url, from.as_ref(), refused);
                    return Err(Failure::Lasting(fault));
                }
                Err(Unasked::Unanswered(error)) => return Err(unanswered(error)),
            };
            let Some(next) = redirected(&url, &response)? else {
                return Ok(response);
            };
            if request.at_home && next.origin() != first.origin() {
                return Ok(response);
            }
            rule = self.next_rule(rule, &url, &response);
            from = Some(std::mem::replace(&mut url, next));
        }
        Err(lasting(format!(
            "{first} redirects more than {REDIRECTS_MAX} times, at last to {url}"
        )))
    }

    /// Describes why an address is refused: the flag, or the redirect that led
    /// to it.
    fn fault_of_address(
        &self,
        url: &Url,
        from: Option<&Url>,
        refused: AddressRefused,
    ) -> ImageFault {
        let AddressRefused { address, scope } = refused;
        let what = format!("{url} leads to {address}, a {scope} address");
        let message = match (self.trust.public_only, from, scope) {
            (true, ..) => format!("{what}, which --public-addresses-only refuses"),
            (false, None, _) => {
                format!("{what}; --link-local-addresses allows link-local addresses")
            }
            (false, Some(from), _) if self.book.check(self.first_rule(), address).is_err() => {
                format!(
                    "{what}, to which {from} redirects; --link-local-addresses allows link-local \
                     addresses in a list and in redirects from private addresses"
                )
            }
            (false, Some(from), _) => format!(
                "{what}, to which {from} redirects; public addresses may redirect only to public \
                 addresses, so name the target in the list itself"
            ),
        };
        ImageFault {
            code: GrpcCode::FailedPrecondition,
            message,
        }
    }
}

/// Reason for which a request has no answer.
enum Unasked {
    Refused(AddressRefused),
    Unanswered(reqwest::Error),
}

impl From<AddressRefused> for Unasked {
    fn from(refused: AddressRefused) -> Self {
        Self::Refused(refused)
    }
}

fn lasting(message: String) -> Failure {
    Failure::Lasting(ImageFault {
        code: GrpcCode::FailedPrecondition,
        message,
    })
}

/// Returns the target of an answer that is a redirect. A redirect from https to
/// http is followed as well: an image is no secret, and the request carries
/// none.
fn redirected(url: &Url, response: &Response) -> Result<Option<Url>, Failure> {
    let status = response.status();
    if !matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308) {
        return Ok(None);
    }
    let target = response.headers().get(LOCATION);
    let target = target.and_then(|target| std::str::from_utf8(target.as_bytes()).ok());
    let target = target.and_then(|target| url.join(target).ok());
    match target {
        Some(target) if matches!(target.scheme(), "http" | "https") => Ok(Some(target)),
        Some(target) => Err(lasting(format!(
            "{url} redirects to {target}, which is neither http:// nor https://"
        ))),
        None => Err(lasting(format!(
            "the server answered {status} without a usable address to redirect to"
        ))),
    }
}

/// Reads an image of at most `max` bytes. Failures that may pass are retried
/// for at most `patience`.
pub(super) async fn read(
    client: &WebClient,
    url: &Url,
    max: u64,
    patience: Duration,
) -> Result<WebAnswer, ImageFault> {
    let read = repeated(patience, || attempt(client, url, max)).await;
    read.map_err(|failure| match failure {
        Failure::Lasting(fault) => fault,
        Failure::Passing(fault, _) => ImageFault {
            message: format!(
                "{}, also after retries for {} (--url-patience)",
                fault.message,
                humantime::format_duration(patience)
            ),
            ..fault
        },
    })
}

/// Repeats an attempt, with exponential backoff, while its failure may pass and
/// for at most `patience`; returns the last failure.
pub(super) async fn repeated<T, F: Future<Output = Result<T, Failure>>>(
    patience: Duration,
    mut attempt: impl FnMut() -> F,
) -> Result<T, Failure> {
    let started = Instant::now();
    let mut rests = RESTS.build();
    loop {
        let (fault, asked) = match attempt().await {
            Err(Failure::Passing(fault, asked)) => (fault, asked),
            outcome => return outcome,
        };
        let wait = rests
            .next()
            .max(asked.map(|asked| asked.min(RETRY_AFTER_MAX)));
        let wait = wait.unwrap_or_default();
        if started.elapsed().saturating_add(wait) > patience {
            return Err(Failure::Passing(fault, asked));
        }
        tokio::time::sleep(wait).await;
    }
}

/// Makes one attempt; its time limit includes all redirects.
async fn attempt(client: &WebClient, url: &Url, max: u64) -> Result<WebAnswer, Failure> {
    in_time(client, once(client, url, max)).await
}

/// Ends an attempt that takes longer than a request may.
pub(super) async fn in_time<T>(
    client: &WebClient,
    attempt: impl Future<Output = Result<T, Failure>>,
) -> Result<T, Failure> {
    let limit = client.times.request;
    let slow = |_| {
        let message = format!(
            "the server gave no answer within {}",
            humantime::format_duration(limit)
        );
        let code = GrpcCode::DeadlineExceeded;
        Failure::Passing(ImageFault { code, message }, None)
    };
    tokio::time::timeout(limit, attempt).await.map_err(slow)?
}

async fn once(client: &WebClient, url: &Url, max: u64) -> Result<WebAnswer, Failure> {
    let response = client.follow(url, &WebRequest::default()).await?;
    let status = response.status();
    if !status.is_success() {
        return Err(refused(status, response.headers(), SystemTime::now()));
    }
    body(response, max).await
}

/// Reads an answer's body of at most `max` bytes.
pub(super) async fn body(mut response: Response, max: u64) -> Result<WebAnswer, Failure> {
    if let Some(bytes) = response.content_length().filter(|&bytes| bytes > max) {
        return Ok(WebAnswer::TooLarge(bytes));
    }
    let encoding = response.headers().get(CONTENT_ENCODING);
    let encoding = encoding.and_then(|encoding| encoding.to_str().ok());
    let mut body = BodyDecoder::new(encoding, max);
    while let Some(piece) = response.chunk().await.map_err(unanswered)? {
        if let Err(error) = body.push(&piece) {
            return undecoded(&error, max);
        }
    }
    match body.finish() {
        Ok(image) => Ok(WebAnswer::Image(image)),
        Err(error) => undecoded(&error, max),
    }
}

/// Converts the error of a body into the answer, or the failure.
fn undecoded(error: &BodyRefused, max: u64) -> Result<WebAnswer, Failure> {
    match error {
        BodyRefused::TooLarge(_) => Ok(WebAnswer::TooLarge(max.saturating_add(1))),
        error => Err(lasting(error.to_string())),
    }
}

/// Converts an answer other than success into a failure.
pub(super) fn refused(status: StatusCode, headers: &HeaderMap, now: SystemTime) -> Failure {
    let code = match status.as_u16() {
        401 | 403 => GrpcCode::PermissionDenied,
        404 | 410 => GrpcCode::NotFound,
        408 | 429 | 500.. => GrpcCode::Unavailable,
        _ => GrpcCode::FailedPrecondition,
    };
    let fault = ImageFault {
        code,
        message: format!("the server answered {status}"),
    };
    if code != GrpcCode::Unavailable {
        return Failure::Lasting(fault);
    }
    let asked = headers.get(RETRY_AFTER).and_then(|text| text.to_str().ok());
    Failure::Passing(fault, asked.and_then(|text| retry_after(text, now)))
}

/// Parses `Retry-After`, a number of seconds or a date, into a rest. Any other
/// text asks for no rest. No rest is longer than [`RETRY_AFTER_MAX`], however
/// many digits the number has.
fn retry_after(text: &str, now: SystemTime) -> Option<Duration> {
    let text = text.trim();
    let rest = if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
        text.parse().map_or(Duration::MAX, Duration::from_secs)
    } else {
        let until = httpdate::parse_http_date(text).ok()?;
        // A date in the past asks for a retry now.
        until.duration_since(now).unwrap_or_default()
    };
    Some(rest.min(RETRY_AFTER_MAX))
}

/// Converts the error of a request without an answer, or with only a part of
/// it, into a failure.
fn unanswered(error: reqwest::Error) -> Failure {
    let error = error.without_url();
    let causes = std::iter::successors(error.source(), |&cause| cause.source());
    let causes: Vec<String> = causes.map(ToString::to_string).collect();
    // The system's resolver has no error kind for an unknown host name.
    let unresolved = causes.iter().any(|cause| {
        cause.contains("failed to lookup address") && !cause.contains("Temporary failure")
    });
    let is_lasting = unresolved || error.is_redirect() || error.is_builder();
    let code = match (unresolved, error.is_timeout()) {
        (true, _) => GrpcCode::NotFound,
        (_, true) => GrpcCode::DeadlineExceeded,
        _ if is_lasting => GrpcCode::FailedPrecondition,
        _ => GrpcCode::Unavailable,
    };
    let what = causes.last().cloned();
    let fault = ImageFault {
        code,
        message: format!(
            "the server gave no answer: {}",
            what.unwrap_or_else(|| error.to_string())
        ),
    };
    if is_lasting {
        Failure::Lasting(fault)
    } else {
        Failure::Passing(fault, None)
    }
}

#[cfg(test)]
mod tests;
