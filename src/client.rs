//! Client of a worker, for the commands that talk to one.
//!
//! The client repeats a call that a full worker rejects, after the delay that
//! the worker asks for.

pub(crate) mod load;
pub mod pool;
use std::borrow::Cow;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use bytes::Bytes;
use clap::Args;
use tonic::metadata::AsciiMetadataValue;
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use tonic::{Code, Request, Response, Status, Streaming};
use tonic_types::StatusExt as _;

use crate::files::{self, FlagFile};
use crate::proto::pb::image_gpt_service_client::ImageGptServiceClient;
use crate::proto::{GrpcCode, pb};

/// Longest time to establish a connection to a worker.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Largest response that the client decodes: larger than any that a worker may
/// be told to send.
pub(super) const RESPONSE_BYTES_MAX: usize = 1 << 31;

/// Longest time for which one call that a worker rejects is repeated. After it
/// the call fails, since the calls that follow would hardly fare better.
const PATIENCE: Duration = Duration::from_mins(5);
/// Shortest and longest wait before a rejected call is repeated. The worker
/// asks for a wait by its own measurements, which may be off.
const RETRY_MIN: Duration = Duration::from_millis(5);
const RETRY_MAX: Duration = Duration::from_secs(30);

/// Help heading of the flags below. Each argument names the heading, since a
/// heading of the whole struct would also cover the flags that a command has
/// after them.
const ACCESS: &str = "Access";

/// TLS and authentication flags of every command that calls a worker.
#[derive(Debug, Clone, Default, Args)]
pub struct ConnectConfig {
    /// PEM file with the CA certificates that sign the worker's certificate,
    /// for https:// endpoints [default: the public certificate authorities]
    #[arg(long, global = true, help_heading = ACCESS, env = "IMAGEGPT_CLIENT_TLS_CA", value_name = "FILE")]
    pub tls_ca: Option<PathBuf>,

    /// PEM file with this client's certificate chain, for workers that require
    /// a client certificate
    #[arg(
        long,
        global = true,
        help_heading = ACCESS,
        env = "IMAGEGPT_CLIENT_TLS_CERT",
        value_name = "FILE",
        requires = "tls_client_key"
    )]
    pub tls_client_cert: Option<PathBuf>,

    /// PEM file with the private key of --tls-client-cert
    #[arg(
        long,
        global = true,
        help_heading = ACCESS,
        env = "IMAGEGPT_CLIENT_TLS_KEY",
        value_name = "FILE",
        requires = "tls_client_cert"
    )]
    pub tls_client_key: Option<PathBuf>,

    /// File with the bearer token that every call sends: its first line that is
    /// neither empty nor a comment (#)
    #[arg(long, global = true, help_heading = ACCESS, env = "IMAGEGPT_TOKEN_FILE", value_name = "FILE")]
    pub token_file: Option<PathBuf>,
}

impl ConnectConfig {
    /// Puts a scheme before an address without one: https with a flag of TLS,
    /// http without.
    pub(crate) fn with_scheme<'a>(&self, url: &'a str) -> Cow<'a, str> {
        let port = url.rsplit_once(':').map(|(_, port)| port);
        if url.contains("://") || port.is_none_or(|port| port.parse::<u16>().is_err()) {
            return url.into();
        }
        let uses_tls = self.tls_ca.is_some() || self.tls_client_cert.is_some();
        let scheme = if uses_tls { "https" } else { "http" };
        format!("{scheme}://{url}").into()
    }

    /// Makes the endpoint, with TLS as the flags say, that connects to `url`,
    /// such as `http://127.0.0.1:50051`, or `127.0.0.1:50051` alone.
    ///
    /// # Errors
    ///
    /// When the address is malformed or a file cannot be used.
    pub fn endpoint(&self, url: &str) -> anyhow::Result<Endpoint> {
        let url = &*self.with_scheme(url);
        let endpoint = Endpoint::from_shared(url.to_owned())
            .with_context(|| format!("--endpoint {url} is not a URL; write http://HOST:PORT"))?
            .connect_timeout(CONNECT_TIMEOUT);
        anyhow::ensure!(
            matches!(endpoint.uri().scheme_str(), Some("http" | "https")),
            "--endpoint {url} begins with neither http:// nor https://; write http://HOST:PORT"
        );
        if endpoint.uri().scheme_str() != Some("https") {
            anyhow::ensure!(
                self.tls_ca.is_none() && self.tls_client_cert.is_none(),
                "--endpoint {url} does not use TLS, so --tls-ca and --tls-client-cert have no \
                 effect; write https://, or leave them out"
            );
            return Ok(endpoint);
        }
        let mut tls = ClientTlsConfig::new();
        tls = match &self.tls_ca {
            Some(path) => tls.ca_certificate(Certificate::from_pem(read("--tls-ca", path)?)),
            None => tls.with_webpki_roots(),
        };
        if let (Some(certificate), Some(key)) = (&self.tls_client_cert, &self.tls_client_key) {
            tls = tls.identity(Identity::from_pem(
                read("--tls-client-cert", certificate)?,
                read("--tls-client-key", key)?,
            ));
        }
        endpoint.tls_config(tls).with_context(|| {
            format!(
                "--endpoint {url}: cannot use the certificates of --tls-ca, --tls-client-cert \
                     and --tls-client-key"
            )
        })
    }

    /// Reads the bearer token that every call must carry, if `--token-file` is
    /// given.
    ///
    /// # Errors
    ///
    /// When the token file cannot be read or has no token.
    pub fn token(&self) -> anyhow::Result<Token> {
        let Some(path) = &self.token_file else {
            return Ok(Token(None));
        };
        let content = read("--token-file", path)?;
        let shown = path.display();
        let text = files::text(&content)
            .with_context(|| format!("--token-file {shown}: the file is not UTF-8 text"))?;
        let token = text
            .lines()
            .map(str::trim)
            .find(|line| !line.is_empty() && !line.starts_with('#'))
            .with_context(|| format!("--token-file {shown} has no token"))?;
        anyhow::ensure!(
            !token.contains(char::is_whitespace),
            "--token-file {shown}: the first line has several words, and a token has no spaces; \
             give a file with the token alone, not the --auth-tokens-file of the worker"
        );
        let mut value = AsciiMetadataValue::try_from(format!("Bearer {token}"))
            .with_context(|| format!("--token-file {shown}: not an ASCII token"))?;
        value.set_sensitive(true);
        Ok(Token(Some(value)))
    }
}

fn read(flag: &'static str, path: &Path) -> anyhow::Result<Vec<u8>> {
    FlagFile::new(flag, path).read()
}

/// Interceptor that puts the bearer token into each call.
#[derive(Debug, Clone)]
pub struct Token(Option<AsciiMetadataValue>);

impl Interceptor for Token {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(token) = &self.0 {
            request
                .metadata_mut()
                .insert("authorization", token.clone());
        }
        Ok(request)
    }
}

type Inner = ImageGptServiceClient<InterceptedService<Channel, Token>>;

/// Connection to one worker.
#[derive(Debug, Clone)]
pub struct Client(Inner);

impl Client {
    /// Connects to `url`, such as `http://127.0.0.1:50051`.
    ///
    /// # Errors
    ///
    /// When the address is malformed, a file cannot be used, or nothing
    /// answers there.
    pub async fn connect(url: &str, config: &ConnectConfig) -> anyhow::Result<Self> {
        let token = config.token()?;
        let channel = config
            .endpoint(url)?
            .connect()
            .await
            .with_context(|| format!("no worker answers at {url}"))?;
        let client = ImageGptServiceClient::with_interceptor(channel, token)
            .max_decoding_message_size(RESPONSE_BYTES_MAX);
        Ok(Self(client))
    }

    /// Asks the worker which model it serves.
    ///
    /// # Errors
    ///
    /// The status with which the call failed.
    pub async fn model(&mut self) -> anyhow::Result<pb::GetModelResponse> {
        let request = pb::GetModelRequest {};
        self.call(request, async |client, request| {
            client.get_model(request).await
        })
        .await
    }

    /// Computes mean-pooled f32 embeddings of length 1 of encoded images. An
    /// image that fails has the text of its error instead.
    ///
    /// # Errors
    ///
    /// The status with which the call failed.
    pub async fn embed(
        &mut self,
        encoded: Vec<Bytes>,
        preprocess: pb::Preprocess,
    ) -> anyhow::Result<Vec<Result<Vec<f32>, String>>> {
        let n_images = encoded.len();
        let request = pb::EmbedRequest {
            images: encoded.into_iter().map(image).collect(),
            preprocess: Some(preprocess),
            normalize: true,
            ..Default::default()
        };
        let response = self.call(request, async |client, request| client.embed(request).await);
        let results = response.await?.results.into_iter();
        complete(
            n_images,
            results.map(|result| match result.outcome {
                Some(pb::embed_result::Outcome::Embedding(tensor)) => Ok(f32s(&tensor.data)),
                Some(pb::embed_result::Outcome::Error(status)) => Err(status.message),
                None => Err(NO_OUTCOME.to_owned()),
            }),
        )
    }

    /// Classifies encoded images: the best `top_k` classes of each, best first.
    /// `head` names a linear head, or is empty for the worker's default.
    ///
    /// # Errors
    ///
    /// The status with which the call failed.
    pub async fn classify(
        &mut self,
        encoded: Vec<Bytes>,
        preprocess: pb::Preprocess,
        head: &str,
        top_k: u32,
    ) -> anyhow::Result<Vec<Result<Classes, String>>> {
        let n_images = encoded.len();
        let request = pb::ClassifyRequest {
            images: encoded.into_iter().map(image).collect(),
            preprocess: Some(preprocess),
            top_k,
            head: head.to_owned(),
            ..Default::default()
        };
        let response = self.call(request, async |client, request| {
            client.classify(request).await
        });
        let response = response.await?;
        let (results, head) = (response.results.into_iter(), response.head);
        complete(
            n_images,
            results.map(|result| match result.outcome {
                Some(pb::classify_result::Outcome::Classification(found)) => Ok(Classes {
                    head: head.clone(),
                    best: found.classes,
                    logits: found
                        .logits
                        .map_or_else(Vec::new, |logits| f32s(&logits.data)),
                }),
                Some(pb::classify_result::Outcome::Error(status)) => Err(status.message),
                None => Err(NO_OUTCOME.to_owned()),
            }),
        )
    }

    /// Computes the likelihood of encoded images under the model.
    ///
    /// # Errors
    ///
    /// The status with which the call failed.
    pub async fn score(
        &mut self,
        encoded: Vec<Bytes>,
        preprocess: pb::Preprocess,
        options: ScoreOptions,
    ) -> anyhow::Result<Vec<Result<Score, String>>> {
        let n_images = encoded.len();
        let request = pb::ScoreRequest {
            images: encoded.into_iter().map(image).collect(),
            preprocess: Some(preprocess),
            map: options.map,
            complexity: options.complexity,
        };
        let response = self.call(request, async |client, request| client.score(request).await);
        let results = response.await?.results.into_iter();
        complete(
            n_images,
            results.map(|result| match result.outcome {
                Some(pb::score_result::Outcome::Score(score)) => Ok(Score {
                    nats: score.nats,
                    nats_per_token: score.nats_per_token,
                    bits_per_token: score.bits_per_token,
                    map: score.map.map_or_else(Vec::new, |map| f32s(&map.data)),
                    complexity_bits_per_token: score.complexity_bits_per_token,
                }),
                Some(pb::score_result::Outcome::Error(status)) => Err(status.message),
                None => Err(NO_OUTCOME.to_owned()),
            }),
        )
    }

    /// Computes the tokens of encoded images.
    ///
    /// # Errors
    ///
    /// The status with which the call failed.
    pub async fn tokenize(
        &mut self,
        encoded: Vec<Bytes>,
        preprocess: pb::Preprocess,
    ) -> anyhow::Result<Vec<Result<Vec<u32>, String>>> {
        let n_images = encoded.len();
        let request = pb::TokenizeRequest {
            images: encoded.into_iter().map(image).collect(),
            preprocess: Some(preprocess),
        };
        let response = self.call(request, async |client, request| {
            client.tokenize(request).await
        });
        let results = response.await?.results.into_iter();
        complete(
            n_images,
            results.map(|result| match result.outcome {
                Some(pb::tokenize_result::Outcome::Tokens(tokens)) => Ok(tokens.ids),
                Some(pb::tokenize_result::Outcome::Error(status)) => Err(status.message),
                None => Err(NO_OUTCOME.to_owned()),
            }),
        )
    }

    /// Starts to generate images. Dropping the returned stream cancels the
    /// call.
    ///
    /// # Errors
    ///
    /// The status with which the call failed.
    pub async fn generate(&mut self, request: pb::GenerateRequest) -> anyhow::Result<Generation> {
        let response = self.call(request, async |client, request| {
            client.generate(request).await
        });
        Ok(Generation(response.await?))
    }

    /// Makes a call, and repeats it while the worker rejects it and says when
    /// it will have room, for at most [`PATIENCE`].
    async fn call<Q: Clone, R>(
        &mut self,
        request: Q,
        call: impl AsyncFn(&mut Inner, Q) -> Result<Response<R>, Status>,
    ) -> anyhow::Result<R> {
        let begun = Instant::now();
        loop {
            let status = match call(&mut self.0, request.clone()).await {
                Ok(response) => return Ok(response.into_inner()),
                Err(status) => status,
            };
            match retry_after(&status) {
                Some(wait) if begun.elapsed() + wait < PATIENCE => tokio::time::sleep(wait).await,
                _ => return Err(call_failed(&status)),
            }
        }
    }
}

/// Returns the delay that a worker without room asks for. RESOURCE_EXHAUSTED
/// without a delay means that the call itself is too large, now and later.
fn retry_after(status: &Status) -> Option<Duration> {
    if status.code() != Code::ResourceExhausted {
        return None;
    }
    let wait = status.get_details_retry_info()?.retry_delay?;
    Some(wait.clamp(RETRY_MIN, RETRY_MAX))
}

/// Result of Classify for one image.
#[derive(Debug, Clone, Default)]
pub struct Classes {
    /// Name of the linear head that scored; empty for the checkpoint's own
    /// head.
    pub head: String,
    /// Classes, best first; empty when the model names no classes.
    pub best: Vec<pb::ClassScore>,
    /// Logits of all classes; set only when the model names no classes.
    pub logits: Vec<f32>,
}

/// Optional results of Score, besides the sums.
#[derive(Debug, Clone, Copy)]
pub struct ScoreOptions {
    pub map: bool,
    pub complexity: bool,
}

/// Result of Score for one image.
#[derive(Debug, Clone)]
pub struct Score {
    pub nats: f64,
    pub nats_per_token: f64,
    pub bits_per_token: f64,
    /// Nats of each pixel in raster order; empty unless asked for.
    pub map: Vec<f32>,
    pub complexity_bits_per_token: Option<f64>,
}

/// Stream of images that a worker is generating.
#[derive(Debug)]
pub struct Generation(Streaming<pb::GenerateResponse>);

impl Generation {
    /// Returns the next message; `None` after the last image.
    ///
    /// # Errors
    ///
    /// The status with which the call failed.
    pub async fn next(&mut self) -> anyhow::Result<Option<pb::generate_response::Message>> {
        loop {
            match self.0.message().await {
                // A message of a kind that only newer workers send is skipped.
                Ok(Some(pb::GenerateResponse { message: None })) => {}
                Ok(response) => return Ok(response.and_then(|response| response.message)),
                Err(status) => return Err(call_failed(&status)),
            }
        }
    }
}

const NO_OUTCOME: &str = "the worker sent no outcome";

/// Checks that there is one outcome for each image; otherwise answers could be
/// taken for those of other images.
fn complete<T>(
    n_images: usize,
    outcomes: impl ExactSizeIterator<Item = Result<T, String>>,
) -> anyhow::Result<Vec<Result<T, String>>> {
    anyhow::ensure!(
        outcomes.len() == n_images,
        "the worker sent {} results for {n_images} images",
        outcomes.len()
    );
    Ok(outcomes.collect())
}

fn image(encoded: Bytes) -> pb::Image {
    pb::Image {
        source: Some(pb::image::Source::Encoded(encoded)),
    }
}

fn f32s(data: &[u8]) -> Vec<f32> {
    data.chunks_exact(4)
        .map(|bytes| f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
        .collect()
}

/// Error of a call that the worker did not carry out.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{code}: {message}")]
pub struct CallError {
    pub code: GrpcCode,
    pub message: String,
}

impl CallError {
    /// True if the same call would also fail on a healthy worker.
    #[must_use]
    pub fn is_of_request(&self) -> bool {
        matches!(
            self.code,
            GrpcCode::InvalidArgument
                | GrpcCode::NotFound
                | GrpcCode::Unimplemented
                | GrpcCode::Unauthenticated
        )
    }
}

fn call_failed(status: &Status) -> anyhow::Error {
    anyhow::Error::new(CallError {
        code: status.code().into(),
        message: status.message().to_owned(),
    })
}
