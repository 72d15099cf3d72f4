//! Images that a list names by URL. What a server does with one is that image's
//! outcome: of a million addresses some are gone, and their job goes on.
//!
//! What may pass (a server that is busy, away or slow) is asked again for a
//! while; what will not (an address that is gone or forbidden, a host that nobody
//! knows) is an error at once.

use std::error::Error as _;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use backon::{BackoffBuilder as _, ExponentialBuilder};
use bytes::{Bytes, BytesMut};
use hyper_util::client::proxy::matcher::Matcher;
use reqwest::header::{HeaderMap, LOCATION, RETRY_AFTER};
use reqwest::{Client, Response, StatusCode, Url, redirect};
use tokio::time::Instant;

use super::address::{AddressBook, AddressRefused, AddressRule, AddressScope, RuledNames};
use crate::client::pool::ImageFault;
use crate::proto::GrpcCode;

/// The first rest between attempts; those after it double.
const REST_MIN: Duration = Duration::from_millis(500);
/// Rests between attempts, up to the longest.
const RESTS: ExponentialBuilder = ExponentialBuilder::new()
    .with_min_delay(REST_MIN)
    .with_max_delay(Duration::from_secs(10))
    .without_max_times();
/// The longest rest that a server may ask for: as long as `--url-patience` can
/// be, so that more is only another way to say never.
const RETRY_AFTER_MAX: Duration = Duration::from_hours(24);
/// Redirects of one address, as browsers and curl bound them; more lead in a
/// circle.
const REDIRECTS_MAX: usize = 10;
/// Some servers answer nobody who does not say who they are.
const USER_AGENT: &str = concat!("imagegpt/", env!("CARGO_PKG_VERSION"));

/// What is at an address.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum WebAnswer {
    Image(Bytes),
    /// So many bytes or more, which is over the limit.
    TooLarge(u64),
}

/// What keeps an image from being read.
#[derive(Debug, PartialEq, Eq)]
enum Failure {
    Lasting(ImageFault),
    /// And the rest that the server asks for.
    Passing(ImageFault, Option<Duration>),
}

/// Trust in a list.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct WebTrust {
    /// `--link-local-addresses`.
    pub(super) link_local: bool,
    /// `--public-addresses-only`.
    pub(super) public_only: bool,
}

/// How long servers are waited for.
#[derive(Debug, Clone, Copy)]
pub(super) struct WebTimes {
    pub(super) connect: Duration,
    /// For one attempt with all its redirects.
    pub(super) request: Duration,
}

/// A client of all servers. Each rule has connections of its own: one that a
/// list may have opened is never there for what a public address redirects to.
#[derive(Debug)]
pub(super) struct WebClient {
    named: Client,
    public: Client,
    /// For what goes through a proxy, which looks names up itself.
    proxied: Client,
    proxies: Matcher,
    book: AddressBook,
    trust: WebTrust,
    times: WebTimes,
}

impl WebClient {
    /// # Errors
    ///
    /// When the process cannot have one.
    pub(super) fn new(
        trust: WebTrust,
        times: WebTimes,
        book: AddressBook,
    ) -> reqwest::Result<Self> {
        // Whichever of the two libraries of TLS comes first installs it.
        let _ = tokio_rustls::rustls::crypto::ring::default_provider().install_default();
        let builder = || {
            Client::builder()
                .user_agent(USER_AGENT)
                .connect_timeout(times.connect)
                .timeout(times.request)
                // Each step is looked at before it is taken.
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
            // Where reqwest looks, too.
            proxies: Matcher::from_system(),
            book,
            trust,
            times,
        })
    }

    /// The rule for what a list names itself.
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

    /// One request, to an address that the rule allows.
    async fn ask(&self, url: &Url, rule: AddressRule) -> Result<Response, Unasked> {
        self.book.check_literal(rule, url)?;
        let client = if self.goes_through_a_proxy(url) {
            &self.proxied
        } else if rule == AddressRule::Public {
            &self.public
        } else {
            &self.named
        };
        let response = client.get(url.clone()).send().await;
        response.map_err(|error| {
            let causes = std::iter::successors(error.source(), |&cause| cause.source());
            let refused = causes.filter_map(|cause| cause.downcast_ref::<AddressRefused>());
            match refused.copied().next() {
                Some(refused) => Unasked::Refused(refused),
                None => Unasked::Unanswered(error),
            }
        })
    }

    /// The rule for what this answer redirects to: whatever a public address,
    /// or one that nobody knows, says is none of the list's own words.
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

    /// Follows redirects to an answer that is none.
    async fn follow(&self, first: &Url) -> Result<Response, Failure> {
        let mut rule = self.first_rule();
        let mut url = first.clone();
        let mut from = None;
        for _ in 0..=REDIRECTS_MAX {
            let response = match self.ask(&url, rule).await {
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
            rule = self.next_rule(rule, &url, &response);
            from = Some(std::mem::replace(&mut url, next));
        }
        Err(lasting(format!(
            "{first} redirects more than {REDIRECTS_MAX} times, at last to {url}"
        )))
    }

    /// Why an address is not asked: by which flag, or since it was redirected to.
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
            (false, None, _) => format!("{what}; --link-local-addresses allows such"),
            (false, Some(from), _) if self.book.check(self.first_rule(), address).is_err() => {
                format!(
                    "{what}, to which {from} redirects; --link-local-addresses allows such in a                      list and behind private addresses"
                )
            }
            (false, Some(from), _) => format!(
                "{what}, to which {from} redirects, and no public address may; name it in the                  list itself"
            ),
        };
        ImageFault {
            code: GrpcCode::FailedPrecondition,
            message,
        }
    }
}

/// Why there is no answer.
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

/// Where an answer redirects to, if it does. From https to http is followed as
/// well: an image is no secret, and nothing secret is sent for it.
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
            "the server answered {status} and no address to go to"
        ))),
    }
}

/// Reads an image of `max` bytes at most; what may pass is tried again for
/// `patience`.
pub(super) async fn read(
    client: &WebClient,
    url: &Url,
    max: u64,
    patience: Duration,
) -> Result<WebAnswer, ImageFault> {
    let started = Instant::now();
    let mut rests = RESTS.build();
    loop {
        let (fault, asked) = match attempt(client, url, max).await {
            Ok(answer) => return Ok(answer),
            Err(Failure::Lasting(fault)) => return Err(fault),
            Err(Failure::Passing(fault, asked)) => (fault, asked),
        };
        let wait = rests
            .next()
            .max(asked.map(|asked| asked.min(RETRY_AFTER_MAX)));
        let wait = wait.unwrap_or_default();
        if started.elapsed().saturating_add(wait) > patience {
            return Err(ImageFault {
                message: format!(
                    "{}, also when asked again for {} (--url-patience)",
                    fault.message,
                    humantime::format_duration(patience)
                ),
                ..fault
            });
        }
        tokio::time::sleep(wait).await;
    }
}

/// One attempt, which has its time with all redirects.
async fn attempt(client: &WebClient, url: &Url, max: u64) -> Result<WebAnswer, Failure> {
    let limit = client.times.request;
    let slow = |_| {
        let message = format!(
            "the server gave no answer: it took longer than {}",
            humantime::format_duration(limit)
        );
        let code = GrpcCode::DeadlineExceeded;
        Failure::Passing(ImageFault { code, message }, None)
    };
    tokio::time::timeout(limit, once(client, url, max))
        .await
        .map_err(slow)?
}

async fn once(client: &WebClient, url: &Url, max: u64) -> Result<WebAnswer, Failure> {
    let mut response = client.follow(url).await?;
    let status = response.status();
    if !status.is_success() {
        return Err(refused(status, response.headers(), SystemTime::now()));
    }
    if let Some(bytes) = response.content_length().filter(|&bytes| bytes > max) {
        return Ok(WebAnswer::TooLarge(bytes));
    }
    let mut image = BytesMut::new();
    while let Some(chunk) = response.chunk().await.map_err(unanswered)? {
        let bytes = (image.len() as u64).saturating_add(chunk.len() as u64);
        if bytes > max {
            return Ok(WebAnswer::TooLarge(bytes));
        }
        image.extend_from_slice(&chunk);
    }
    Ok(WebAnswer::Image(image.freeze()))
}

/// What an answer other than the image means.
fn refused(status: StatusCode, headers: &HeaderMap, now: SystemTime) -> Failure {
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

/// The rest that `Retry-After` asks for, in seconds or until a date. Whatever is
/// neither asks for nothing, and no rest is longer than [`RETRY_AFTER_MAX`],
/// however many digits it has.
fn retry_after(text: &str, now: SystemTime) -> Option<Duration> {
    let text = text.trim();
    let rest = if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
        text.parse().map_or(Duration::MAX, Duration::from_secs)
    } else {
        let until = httpdate::parse_http_date(text).ok()?;
        // One that is past asks to come back now.
        until.duration_since(now).unwrap_or_default()
    };
    Some(rest.min(RETRY_AFTER_MAX))
}

/// What it means that there is no answer, or not all of it.
fn unanswered(error: reqwest::Error) -> Failure {
    let error = error.without_url();
    let causes = std::iter::successors(error.source(), |&cause| cause.source());
    let causes: Vec<String> = causes.map(ToString::to_string).collect();
    // The system's own resolver has no kind of error for it.
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
