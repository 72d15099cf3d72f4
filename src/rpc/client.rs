//! A client of the worker, for the commands that talk to one.

use std::time::Duration;

use anyhow::Context as _;
use bytes::Bytes;
use tonic::transport::{Channel, Endpoint};

use crate::pb;
use crate::pb::image_gpt_service_client::ImageGptServiceClient;

/// How long to look for the worker before giving up.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Large enough for any response that a worker may be told to send.
const RESPONSE_BYTES_MAX: usize = 1 << 31;

/// A connection to one worker.
#[derive(Debug, Clone)]
pub struct Client(ImageGptServiceClient<Channel>);

impl Client {
    /// Connects to `endpoint`, such as `http://127.0.0.1:50051`.
    ///
    /// # Errors
    ///
    /// When the address is malformed or nothing answers there.
    pub async fn connect(endpoint: &str) -> anyhow::Result<Self> {
        let channel = Endpoint::from_shared(endpoint.to_owned())
            .with_context(|| format!("--endpoint {endpoint} is not a URL"))?
            .connect_timeout(CONNECT_TIMEOUT)
            .connect()
            .await
            .with_context(|| format!("no worker answers at {endpoint}"))?;
        let client =
            ImageGptServiceClient::new(channel).max_decoding_message_size(RESPONSE_BYTES_MAX);
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
fn call_failed(status: &tonic::Status) -> anyhow::Error {
    anyhow::anyhow!(
        "{}: {}",
        super::status::name(status.code()),
        status.message()
    )
}
