//! Bearer tokens: a layer that refuses calls before their bodies are read.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use anyhow::Context as _;
use http::{HeaderMap, Request, Response, header};
use sha2::{Digest as _, Sha256};
use subtle::{Choice, ConstantTimeEq as _};
use tonic::body::Body;
use tower::{Layer, Service};

use super::listen::Peer;
use super::reload::{Follower, Latest, open};
use super::status;
use crate::files::FlagFile;
use crate::serve::metrics::AccessFile;
use crate::serve::rpc::error::RequestError;

/// Shorter ones can be guessed: 16 random letters and digits are 95 bits.
const TOKEN_LEN_MIN: usize = 16;
/// Every call is held against every token.
const TOKENS_MAX: usize = 256;
/// What stays open: probes of Kubernetes cannot send a token.
pub(super) const OPEN: &str = "/grpc.health.v1.Health/";

/// The tokens that are accepted, as hashes: of equal length, so that comparing
/// tells nothing of it, and no tokens lie in memory.
#[derive(Debug)]
pub(super) struct AcceptedTokens(Vec<[u8; 32]>);

impl AcceptedTokens {
    pub(super) fn open(source: FlagFile) -> anyhow::Result<(Latest<Self>, Follower<Self>)> {
        let name = source.to_string();
        open(AccessFile::Tokens, vec![source], move |contents| {
            Self::parse(&contents[0]).with_context(|| name.clone())
        })
    }

    /// One token a line. What is wrong is told by its line, never by its text.
    fn parse(content: &[u8]) -> anyhow::Result<Self> {
        let text = std::str::from_utf8(content).context("it is not text")?;
        let mut tokens = Vec::new();
        for (idx, line) in text.lines().enumerate() {
            let token = line.trim();
            if token.is_empty() || token.starts_with('#') {
                continue;
            }
            let line = idx + 1;
            anyhow::ensure!(
                token.bytes().all(|byte| byte.is_ascii_graphic()),
                "line {line}: a token has only ASCII characters and no space"
            );
            anyhow::ensure!(
                token.len() >= TOKEN_LEN_MIN,
                "line {line}: the token has {} characters; make it {TOKEN_LEN_MIN} or more \
                 (openssl rand -hex 32)",
                token.len()
            );
            anyhow::ensure!(
                tokens.len() < TOKENS_MAX,
                "line {line}: there are more than {TOKENS_MAX} tokens"
            );
            tokens.push(hash(token));
        }
        anyhow::ensure!(!tokens.is_empty(), "it has no token; put one on a line");
        Ok(Self(tokens))
    }

    /// Whether a call may pass. It takes as long for every wrong token.
    fn check(&self, headers: &HeaderMap) -> Result<(), RequestError> {
        let missing = RequestError::Unauthenticated {
            problem: "the call has no bearer token; send metadata `authorization: Bearer TOKEN`",
        };
        let token = headers
            .get(header::AUTHORIZATION)
            .and_then(|value| bearer(value.as_bytes()));
        let Some(token) = token else {
            return Err(missing);
        };
        let given = hash(token);
        let mut accepted = Choice::from(0);
        for known in &self.0 {
            accepted |= known.ct_eq(&given);
        }
        if bool::from(accepted) {
            Ok(())
        } else {
            Err(RequestError::Unauthenticated {
                problem: "the bearer token is not one that the worker accepts",
            })
        }
    }
}

fn hash(token: impl AsRef<[u8]>) -> [u8; 32] {
    Sha256::digest(token).into()
}

/// The token of an `authorization` header; its scheme may be written in any
/// case.
fn bearer(value: &[u8]) -> Option<&[u8]> {
    let (scheme, token) = value.split_at_checked("bearer ".len())?;
    let token = token.trim_ascii();
    (scheme.eq_ignore_ascii_case(b"bearer ") && !token.is_empty()).then_some(token)
}

/// Lets pass what brings a token, or everything if none are asked for.
#[derive(Debug, Clone)]
pub(super) struct Auth(pub(super) Option<Latest<AcceptedTokens>>);

impl<S> Layer<S> for Auth {
    type Service = Authenticated<S>;

    fn layer(&self, inner: S) -> Self::Service {
        Authenticated {
            inner,
            tokens: self.0.clone(),
        }
    }
}

#[derive(Debug, Clone)]
pub(super) struct Authenticated<S> {
    inner: S,
    tokens: Option<Latest<AcceptedTokens>>,
}

impl<S> Service<Request<Body>> for Authenticated<S>
where
    S: Service<Request<Body>, Response = Response<Body>>,
    S::Future: Unpin,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = AuthFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        if let Some(tokens) = &self.tokens
            && !request.uri().path().starts_with(OPEN)
            && let Err(error) = tokens.get().check(request.headers())
        {
            let peer = request.extensions().get::<Peer>();
            tracing::debug!(addr = ?peer.and_then(|peer| peer.addr), %error, "a call was refused");
            return AuthFuture::Refusal(Some(status::of_call(&error).into_http()));
        }
        AuthFuture::Passed(self.inner.call(request))
    }
}

/// A call that may pass, or its refusal. Not boxed: every call comes by here.
pub(super) enum AuthFuture<F> {
    Passed(F),
    /// Taken when it is polled, once.
    Refusal(Option<Response<Body>>),
}

impl<F, E> Future for AuthFuture<F>
where
    F: Future<Output = Result<Response<Body>, E>> + Unpin,
{
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match &mut *self {
            Self::Passed(call) => Pin::new(call).poll(cx),
            Self::Refusal(response) => response
                .take()
                .map_or(Poll::Pending, |response| Poll::Ready(Ok(response))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOKEN: &str = "0123456789abcdef";

    #[test]
    fn files() {
        let check = |content: &[u8], expected: Result<usize, &str>| match (
            AcceptedTokens::parse(content),
            expected,
        ) {
            (Ok(tokens), Ok(n)) => assert_eq!(tokens.0.len(), n),
            (Err(error), Err(words)) => {
                let text = format!("{error:#}");
                assert!(text.contains(words), "{text}");
                assert!(!text.contains("secret"), "{text}");
            }
            (got, _) => panic!("{content:?}: {got:?}"),
        };
        check(TOKEN.as_bytes(), Ok(1));
        let several = format!("# ours\n{TOKEN}\r\n\n  {TOKEN}x\n#{TOKEN}");
        check(several.as_bytes(), Ok(2));
        check(b"", Err("it has no token"));
        check(b"# secret only", Err("it has no token"));
        check(
            b"\nsecret",
            Err("line 2: the token has 6 characters; make it 16"),
        );
        check(
            b"secret secret secret",
            Err("line 1: a token has only ASCII"),
        );
        check("sécret-sécret-sécret".as_bytes(), Err("only ASCII"));
        check(b"\xff", Err("it is not text"));
        let many = format!("{TOKEN}\n").repeat(TOKENS_MAX + 1);
        check(many.as_bytes(), Err("more than 256 tokens"));
    }

    #[test]
    fn calls() {
        let tokens =
            AcceptedTokens::parse(format!("another-{TOKEN}\n{TOKEN}").as_bytes()).expect("two");
        let check = |value: Option<&str>, expected: &str| {
            let mut headers = HeaderMap::new();
            if let Some(value) = value {
                headers.insert("authorization", value.parse().expect("a header value"));
            }
            let got = match tokens.check(&headers) {
                Ok(()) => "fine".to_owned(),
                Err(error) => error.to_string(),
            };
            assert!(got.contains(expected), "{value:?}: {got}");
        };
        check(Some(&format!("Bearer {TOKEN}")), "fine");
        check(Some(&format!("bearer  {TOKEN} ")), "fine");
        check(Some(&format!("Bearer another-{TOKEN}")), "fine");
        check(Some(&format!("Bearer {TOKEN}0")), "not one that");
        check(Some(&format!("Bearer {}", &TOKEN[..15])), "not one that");
        check(Some(TOKEN), "no bearer token");
        check(Some(&format!("Basic {TOKEN}")), "no bearer token");
        check(Some("Bearer "), "no bearer token");
        check(None, "no bearer token");
    }
}
