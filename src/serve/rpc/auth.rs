//! Authentication by bearer tokens and client certificates: a check that says
//! who calls, or rejects a call before its body is read.

mod file;

use std::collections::HashMap;

use anyhow::Context as _;
use http::{HeaderMap, Request, Response, header};
use sha2::{Digest as _, Sha256};
use subtle::{ConditionallySelectable as _, ConstantTimeEq as _};
use tonic::body::Body;
use tower_http::validate_request::ValidateRequest;

use self::file::TokensFile;
use super::calling::CallFacts;
use super::listen::Peer;
use super::observe::{PRIORITY, single};
use super::reload::{Follower, Latest, open};
use super::status;
use super::tls::ClientNames;
use crate::excerpt::Excerpt;
use crate::files::FlagFile;
use crate::serve::caller::{Caller, CallerRegistry};
use crate::serve::metrics::ReloadedFile;
use crate::serve::rpc::error::RequestError;

/// Path prefix of calls that need no token: probes of Kubernetes cannot send
/// one.
pub(super) const OPEN: &str = "/grpc.health.v1.Health/";

/// Callers that the tokens file names, and hashes of the accepted tokens.
/// Hashes have equal length, so that a comparison reveals nothing about a
/// token's length, and no tokens are kept in memory.
#[derive(Debug)]
pub(super) struct AcceptedTokens {
    /// Each hash with the place of its caller.
    tokens: Vec<([u8; 32], u32)>,
    /// Subjects of client certificates, each with the place of its caller.
    subjects: HashMap<Box<str>, u32>,
    /// Callers by their places; the first is the one without a name.
    callers: Vec<Caller>,
}

impl AcceptedTokens {
    /// Reads the tokens file. `has_client_ca` is true if client certificates
    /// are verified; `call_images_max` is the number of images of the largest
    /// call.
    pub(super) fn open(
        source: FlagFile,
        has_client_ca: bool,
        call_images_max: u32,
    ) -> anyhow::Result<(Latest<Self>, Follower<Self>)> {
        let name = source.to_string();
        let registry = CallerRegistry::new(call_images_max);
        open(ReloadedFile::Tokens, vec![source], move |contents| {
            let file = TokensFile::parse(&contents[0], has_client_ca);
            Ok(Self::new(&file.with_context(|| name.clone())?, &registry))
        })
    }

    fn new(file: &TokensFile<'_>, registry: &CallerRegistry) -> Self {
        // The file has few lines.
        let place = |idx: usize| u32::try_from(idx + 1).unwrap_or(0);
        let tokens = file.tokens.iter();
        let subjects = file.subjects.iter();
        let mut callers = vec![Caller::default()];
        callers.extend(registry.replace(&file.callers));
        Self {
            tokens: tokens
                .map(|&(token, caller)| (hash(token), caller.map_or(0, place)))
                .collect(),
            subjects: subjects
                .map(|(&subject, &caller)| (subject.into(), place(caller)))
                .collect(),
            callers,
        }
    }

    /// Says who calls: the caller of the call's token, or else of its client
    /// certificate. The check takes the same time for every wrong token.
    ///
    /// # Errors
    ///
    /// [`RequestError::Unauthenticated`] if the file has tokens, the call has
    /// none of them, and no line names its certificate;
    /// [`RequestError::MetadataRepeated`] if the call has several tokens.
    fn check(
        &self,
        headers: &HeaderMap,
        certificate: Option<&ClientNames>,
    ) -> Result<Caller, RequestError> {
        single(headers, &[header::AUTHORIZATION])?;
        let token = headers
            .get(header::AUTHORIZATION)
            .and_then(|value| bearer(value.as_bytes()));
        let by_token = token.and_then(|token| self.by_token(token));
        let mut names = certificate.into_iter().flat_map(ClientNames::iter);
        let mut by_certificate = || names.find_map(|name| self.subjects.get(name).copied());
        // A token without a name leaves it to the certificate to name the
        // caller.
        let place = match by_token {
            Some(place) if place > 0 => Some(place),
            by_token => by_certificate().or(by_token),
        };
        let known = place.and_then(|place| self.callers.get(place as usize));
        match (known, token) {
            (Some(caller), _) => Ok(caller.clone()),
            // The certificate alone lets calls in.
            (None, _) if self.tokens.is_empty() => Ok(Caller::default()),
            (None, None) => Err(RequestError::Unauthenticated {
                problem: "the call has no bearer token; send metadata `authorization: Bearer \
                          TOKEN`",
            }),
            (None, Some(_)) => Err(RequestError::Unauthenticated {
                problem: "the bearer token is not one that the worker accepts",
            }),
        }
    }

    /// Returns the place of a token's caller.
    fn by_token(&self, token: &[u8]) -> Option<u32> {
        let given = hash(token);
        let mut place = u32::MAX;
        for (known, caller) in &self.tokens {
            place.conditional_assign(caller, known.ct_eq(&given));
        }
        (place != u32::MAX).then_some(place)
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

/// Check that lets calls with an accepted token pass, or every call if no tokens
/// are configured.
#[derive(Debug, Clone)]
pub(super) struct Auth(pub(super) Option<Latest<AcceptedTokens>>);

impl ValidateRequest<Body> for Auth {
    type ResponseBody = Body;

    fn validate(&mut self, request: &mut Request<Body>) -> Result<(), Response<Body>> {
        if request.uri().path().starts_with(OPEN) {
            return Ok(());
        }
        identify(self.0.as_ref(), request).map_err(|error| {
            let peer = request.extensions().get::<Peer>();
            tracing::debug!(addr = ?peer.and_then(|peer| peer.addr), %error, "rejected a call");
            status::of_call(&error).into_http()
        })
    }
}

/// Says who calls, to the log and to all that handle the call, or why the call
/// may not pass.
fn identify(
    tokens: Option<&Latest<AcceptedTokens>>,
    request: &Request<Body>,
) -> Result<(), RequestError> {
    let peer = request.extensions().get::<Peer>();
    let certificate = peer.and_then(|peer| peer.certificate.as_ref());
    let caller = match tokens {
        Some(tokens) => tokens.get().check(request.headers(), certificate),
        None => Ok(Caller::default()),
    };
    if let Some(shown) = shown(caller.as_ref().ok(), certificate) {
        tracing::Span::current().record("caller", shown);
    }
    let caller = caller?;
    if let Some(facts) = request.extensions().get::<CallFacts>() {
        let has_asked = request.headers().contains_key(PRIORITY);
        let class = caller.class(has_asked.then_some(facts.class), facts.class);
        facts.caller.fill(caller, class);
    }
    Ok(())
}

/// Returns the caller as the log shows it: its name, or else the first name of
/// its certificate, which nobody can take for a name of the tokens file.
fn shown(caller: Option<&Caller>, certificate: Option<&ClientNames>) -> Option<String> {
    let name = caller.map_or("", Caller::name);
    if !name.is_empty() {
        return Some(name.to_owned());
    }
    let subject = certificate?.iter().next()?;
    let subject = Excerpt::of(subject).to_string();
    Some(format!("cert={}", subject.escape_debug()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOKEN: &str = "0123456789abcdef";

    fn tokens(text: &str) -> AcceptedTokens {
        let file = TokensFile::parse(text.as_bytes(), true).expect("a tokens file");
        AcceptedTokens::new(&file, &CallerRegistry::new(1))
    }

    /// Returns the names of a client whose certificate has these hosts.
    fn certificate(hosts: &[&str]) -> ClientNames {
        let hosts: Vec<String> = hosts.iter().map(|&host| host.to_owned()).collect();
        let made = rcgen::generate_simple_self_signed(hosts).expect("a certificate");
        ClientNames::of(made.cert.der())
    }

    #[test]
    fn callers_have_the_names_of_their_tokens_or_certificates() {
        let tokens = tokens(&format!(
            "billing {TOKEN}-1\n{TOKEN}-2\nmesh cert=mesh.example\nmesh {TOKEN}-3"
        ));
        let check = |token: Option<&str>, hosts: Option<&[&str]>, expected: &str| {
            let mut headers = HeaderMap::new();
            if let Some(token) = token {
                let value = format!("Bearer {TOKEN}-{token}");
                headers.insert("authorization", value.parse().expect("a header value"));
            }
            let certificate = hosts.map(certificate);
            let got = match tokens.check(&headers, certificate.as_ref()) {
                Ok(caller) => caller.name().to_owned(),
                Err(error) => error.to_string(),
            };
            assert!(got.starts_with(expected), "{token:?}, {hosts:?}: {got}");
        };
        let mesh: Option<&[&str]> = Some(&["other.example", "mesh.example"]);
        let stranger: Option<&[&str]> = Some(&["stranger.example"]);
        check(Some("1"), None, "billing");
        check(Some("2"), None, "");
        check(Some("3"), stranger, "mesh");
        check(None, mesh, "mesh");
        check(Some("1"), mesh, "billing");
        check(Some("2"), mesh, "mesh");
        check(Some("9"), mesh, "mesh");
        check(
            None,
            stranger,
            "authorization: the call has no bearer token",
        );
        check(
            Some("9"),
            stranger,
            "authorization: the bearer token is not",
        );
        let mut headers = HeaderMap::new();
        for token in ["1", "3"] {
            let value = format!("Bearer {TOKEN}-{token}");
            headers.append("authorization", value.parse().expect("a header value"));
        }
        let error = tokens.check(&headers, None).expect_err("two tokens");
        assert!(
            error
                .to_string()
                .starts_with("authorization: the call has it"),
            "{error}"
        );
    }

    #[test]
    fn without_tokens_every_verified_client_may_call() {
        let tokens = tokens("mesh cert=mesh.example");
        let name = |host| {
            let caller = tokens.check(&HeaderMap::new(), Some(&certificate(&[host])));
            caller.expect("no token is needed").name().to_owned()
        };
        assert_eq!(name("mesh.example"), "mesh");
        assert_eq!(name("stranger.example"), "");
    }

    #[test]
    fn a_stranger_is_shown_as_a_certificate() {
        let stranger = certificate(&["billing"]);
        assert_eq!(
            shown(None, Some(&stranger)).as_deref(),
            Some("cert=billing")
        );
        let long = certificate(&[&"a".repeat(200)]);
        let text = shown(Some(&Caller::default()), Some(&long)).expect("a name");
        assert_eq!(text, format!("cert={}…", "a".repeat(64)));
        assert_eq!(shown(Some(&Caller::default()), None), None);
    }

    #[test]
    fn calls() {
        let tokens = tokens(&format!("another-{TOKEN}\n{TOKEN}"));
        let check = |value: Option<&str>, expected: &str| {
            let mut headers = HeaderMap::new();
            if let Some(value) = value {
                headers.insert("authorization", value.parse().expect("a header value"));
            }
            let got = match tokens.check(&headers, None) {
                Ok(_) => "fine".to_owned(),
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
