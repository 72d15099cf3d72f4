//! Authentication by bearer tokens: a layer that rejects calls before their
//! bodies are read.

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
use crate::serve::metrics::ReloadedFile;
use crate::serve::rpc::error::RequestError;

/// Shortest length of a token: 16 random letters and digits have 95 bits;
/// shorter tokens can be guessed.
const TOKEN_LEN_MIN: usize = 16;
/// Largest number of tokens, since every call is compared with every token.
const TOKENS_MAX: usize = 256;
/// Path prefix of calls that need no token: probes of Kubernetes cannot send
/// one.
pub(super) const OPEN: &str = "/grpc.health.v1.Health/";

/// Hashes of the accepted tokens. Hashes have equal length, so that a
/// comparison reveals nothing about a token's length, and no tokens are kept in
/// memory.
#[derive(Debug)]
pub(super) struct AcceptedTokens(Vec<[u8; 32]>);

impl AcceptedTokens {
    pub(super) fn open(source: FlagFile) -> anyhow::Result<(Latest<Self>, Follower<Self>)> {
        let name = source.to_string();
        open(ReloadedFile::Tokens, vec![source], move |contents| {
            Self::parse(&contents[0]).with_context(|| name.clone())
        })
    }

    /// Parses a file with one token per line. Errors name the line, never its
    /// text.
    fn parse(content: &[u8]) -> anyhow::Result<Self> {
        let text = std::str::from_utf8(content).context("the file is not UTF-8 text")?;
        let mut tokens = Vec::new();
        for (idx, line) in text.lines().enumerate() {
            let token = line.trim();
            if token.is_empty() || token.starts_with('#') {
                continue;
            }
            let line = idx + 1;
            anyhow::ensure!(
                token.bytes().all(|byte| byte.is_ascii_graphic()),
                "line {line}: a token must have only ASCII characters and no spaces"
            );
            anyhow::ensure!(
                token.len() >= TOKEN_LEN_MIN,
                "line {line}: the token has {} characters; make it {TOKEN_LEN_MIN} or more \
                 (openssl rand -hex 32)",
                token.len()
            );
            anyhow::ensure!(
                tokens.len() < TOKENS_MAX,
                "line {line}: the file has more than {TOKENS_MAX} tokens, which is the limit"
            );
            tokens.push(hash(token));
        }
        anyhow::ensure!(
            !tokens.is_empty(),
            "the file has no token; write one token per line"
        );
        Ok(Self(tokens))
    }

    /// Checks that a call has an accepted token. The check takes the same time
    /// for every wrong token.
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

/// Returns the token of an `authorization` header, whose scheme may be written
/// in upper or lower case.
fn bearer(value: &[u8]) -> Option<&[u8]> {
    let (scheme, token) = value.split_at_checked("bearer ".len())?;
    let token = token.trim_ascii();
    (scheme.eq_ignore_ascii_case(b"bearer ") && !token.is_empty()).then_some(token)
}

/// Layer that lets calls with an accepted token pass, or every call if no
/// tokens are configured.
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
            tracing::debug!(addr = ?peer.and_then(|peer| peer.addr), %error, "rejected a call");
            return AuthFuture::Refusal(Some(status::of_call(&error).into_http()));
        }
        AuthFuture::Passed(self.inner.call(request))
    }
}

/// Future of a call that may pass, or of its rejection. Not boxed, since every
/// call passes through it.
pub(super) enum AuthFuture<F> {
    Passed(F),
    /// Response that rejects the call, taken at the first poll.
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
        check(b"", Err("the file has no token"));
        check(b"# secret only", Err("the file has no token"));
        check(
            b"\nsecret",
            Err("line 2: the token has 6 characters; make it 16"),
        );
        check(
            b"secret secret secret",
            Err("line 1: a token must have only ASCII"),
        );
        check("sécret-sécret-sécret".as_bytes(), Err("only ASCII"));
        check(b"\xff", Err("not UTF-8 text"));
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
