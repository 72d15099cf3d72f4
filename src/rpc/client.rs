//! A client of the worker, for the commands that talk to one.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use bytes::Bytes;
use clap::Args;
use tonic::metadata::AsciiMetadataValue;
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use tonic::{Request, Status};

use super::reload::Source;
use crate::pb;
use crate::pb::image_gpt_service_client::ImageGptServiceClient;

/// How long to look for the worker before giving up.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Large enough for any response that a worker may be told to send.
pub(super) const RESPONSE_BYTES_MAX: usize = 1 << 31;

/// By argument, since a heading of the whole struct would go on over what the
/// command has after it.
const ACCESS: &str = "Access";

/// How to be let in by a worker: flags of every command that talks to one.
#[derive(Debug, Clone, Default, Args)]
pub struct ConnectConfig {
    /// Certificates in PEM of those who sign the worker's, for https://
    /// endpoints [default: the public ones]
    #[arg(long, global = true, help_heading = ACCESS, env = "IMAGEGPT_CLIENT_TLS_CA", value_name = "FILE")]
    pub tls_ca: Option<PathBuf>,

    /// This client's own certificate chain in PEM, for workers that ask for
    /// one
    #[arg(
        long,
        global = true,
        help_heading = ACCESS,
        env = "IMAGEGPT_CLIENT_TLS_CERT",
        value_name = "FILE",
        requires = "tls_client_key"
    )]
    pub tls_client_cert: Option<PathBuf>,

    /// Private key of --tls-client-cert in PEM
    #[arg(
        long,
        global = true,
        help_heading = ACCESS,
        env = "IMAGEGPT_CLIENT_TLS_KEY",
        value_name = "FILE",
        requires = "tls_client_cert"
    )]
    pub tls_client_key: Option<PathBuf>,

    /// A file with the bearer token for every call; of several lines the first
    /// that is no comment
    #[arg(long, global = true, help_heading = ACCESS, env = "IMAGEGPT_TOKEN_FILE", value_name = "FILE")]
    pub token_file: Option<PathBuf>,
}

impl ConnectConfig {
    /// What connects to `url`, such as `http://127.0.0.1:50051`.
    ///
    /// # Errors
    ///
    /// When the address is malformed or a file cannot be used.
    pub fn endpoint(&self, url: &str) -> anyhow::Result<Endpoint> {
        let endpoint = Endpoint::from_shared(url.to_owned())
            .with_context(|| format!("--endpoint {url} is not a URL"))?
            .connect_timeout(CONNECT_TIMEOUT);
        if endpoint.uri().scheme_str() != Some("https") {
            anyhow::ensure!(
                self.tls_ca.is_none() && self.tls_client_cert.is_none(),
                "--endpoint {url} is not TLS, so certificates are of no use; write https://"
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
        endpoint
            .tls_config(tls)
            .with_context(|| format!("the certificates for {url} cannot be used"))
    }

    /// What every call must bring.
    ///
    /// # Errors
    ///
    /// When the file has no token.
    pub fn token(&self) -> anyhow::Result<Token> {
        let Some(path) = &self.token_file else {
            return Ok(Token(None));
        };
        let content = read("--token-file", path)?;
        let text = String::from_utf8_lossy(&content);
        let token = text
            .lines()
            .map(str::trim)
            .find(|line| !line.is_empty() && !line.starts_with('#'))
            .with_context(|| format!("--token-file {} has no token", path.display()))?;
        let mut value = AsciiMetadataValue::try_from(format!("Bearer {token}"))
            .with_context(|| format!("--token-file {}: not an ASCII token", path.display()))?;
        value.set_sensitive(true);
        Ok(Token(Some(value)))
    }
}

fn read(flag: &'static str, path: &Path) -> anyhow::Result<Vec<u8>> {
    Source::new(flag, path).read()
}

/// Puts the token into each call.
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

/// A connection to one worker.
#[derive(Debug, Clone)]
pub struct Client(ImageGptServiceClient<InterceptedService<Channel, Token>>);

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

    /// What the worker serves.
    ///
    /// # Errors
    ///
    /// The call's status.
    pub async fn model(&mut self) -> anyhow::Result<pb::GetModelResponse> {
        let response = self.0.get_model(pb::GetModelRequest {}).await;
        Ok(response
            .map_err(|status| call_failed(&status))?
            .into_inner())
    }

    /// Mean-pooled f32 embeddings of encoded images; an image's own failure is
    /// its sentence.
    ///
    /// # Errors
    ///
    /// The call's status.
    pub async fn embed(
        &mut self,
        encoded: Vec<Bytes>,
        preprocess: pb::Preprocess,
    ) -> anyhow::Result<Vec<Result<Vec<f32>, String>>> {
        let request = pb::EmbedRequest {
            images: encoded.into_iter().map(image).collect(),
            preprocess: Some(preprocess),
            normalize: true,
            ..Default::default()
        };
        let response = self
            .0
            .embed(request)
            .await
            .map_err(|status| call_failed(&status))?
            .into_inner();
        Ok(response
            .results
            .into_iter()
            .map(|result| match result.outcome {
                Some(pb::embed_result::Outcome::Embedding(tensor)) => Ok(f32s(&tensor.data)),
                Some(pb::embed_result::Outcome::Error(status)) => Err(status.message),
                None => Err("the worker sent no outcome".to_owned()),
            })
            .collect())
    }

    /// The best class of encoded images by a linear head, with its score.
    ///
    /// # Errors
    ///
    /// The call's status.
    pub async fn classify(
        &mut self,
        encoded: Vec<Bytes>,
        preprocess: pb::Preprocess,
        head: &str,
    ) -> anyhow::Result<Vec<Result<pb::ClassScore, String>>> {
        let request = pb::ClassifyRequest {
            images: encoded.into_iter().map(image).collect(),
            preprocess: Some(preprocess),
            top_k: 1,
            head: head.to_owned(),
            ..Default::default()
        };
        let response = self
            .0
            .classify(request)
            .await
            .map_err(|status| call_failed(&status))?
            .into_inner();
        Ok(response
            .results
            .into_iter()
            .map(|result| match result.outcome {
                Some(pb::classify_result::Outcome::Classification(mut found)) => {
                    let best = found.classes.drain(..).next();
                    best.ok_or_else(|| "the worker sent no class".to_owned())
                }
                Some(pb::classify_result::Outcome::Error(status)) => Err(status.message),
                None => Err("the worker sent no outcome".to_owned()),
            })
            .collect())
    }

    /// Tokens of encoded images.
    ///
    /// # Errors
    ///
    /// The call's status.
    pub async fn tokenize(
        &mut self,
        encoded: Vec<Bytes>,
        preprocess: pb::Preprocess,
    ) -> anyhow::Result<Vec<Result<Vec<u32>, String>>> {
        let request = pb::TokenizeRequest {
            images: encoded.into_iter().map(image).collect(),
            preprocess: Some(preprocess),
        };
        let response = self
            .0
            .tokenize(request)
            .await
            .map_err(|status| call_failed(&status))?
            .into_inner();
        Ok(response
            .results
            .into_iter()
            .map(|result| match result.outcome {
                Some(pb::tokenize_result::Outcome::Tokens(tokens)) => Ok(tokens.ids),
                Some(pb::tokenize_result::Outcome::Error(status)) => Err(status.message),
                None => Err("the worker sent no outcome".to_owned()),
            })
            .collect())
    }
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

/// A call's status as one line for a person.
fn call_failed(status: &Status) -> anyhow::Error {
    anyhow::anyhow!(
        "{}: {}",
        super::status::name(status.code()),
        status.message()
    )
}
