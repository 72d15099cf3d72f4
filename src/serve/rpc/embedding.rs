//! Options of Embed and EmbedStream, checked once per call, and their
//! application to each answer.

use super::convert;
use crate::engine::EngineFacts;
use crate::imaging::PreprocessOptions;
use crate::model::Model;
use crate::model::graph::{Context, Norm, Want};
use crate::proto;
use crate::proto::pb;
use crate::serve::error::StageError;
use crate::serve::job::{Answer, RequestedWork};
use crate::serve::rpc::error::RequestError;

/// Checked options of Embed or EmbedStream that the model can serve.
#[derive(Debug)]
pub(super) struct Embedding {
    pub(super) preprocess: PreprocessOptions,
    pub(super) dtype: pb::DataType,
    context: Context,
    want: Want,
    norm: Norm,
    normalize: bool,
    /// Width of one vector.
    width: usize,
    shape: Vec<usize>,
}

impl Embedding {
    /// Checks the options of a call, given in the form of EmbedStream's
    /// options.
    pub(super) fn new(
        options: &pb::EmbedStreamOptions,
        model: &Model,
        facts: &EngineFacts,
    ) -> Result<Self, RequestError> {
        let preprocess = convert::preprocess(options.preprocess.as_ref())?;
        let context = convert::context(options.context)?;
        let norm = convert::norm(options.norm)?;
        let want = convert::want(model, options.pooling, &options.layers, norm)?;
        let dtype = convert::dtype(options.dtype)?;
        let width = facts.dimension;
        let shape = match want {
            Want::States => vec![model.positions(), width],
            Want::Features { layers, .. } if layers.len() > 1 => vec![layers.len(), width],
            Want::Features { .. } | Want::Mean | Want::Last | Want::Logits | Want::Nll => {
                vec![width]
            }
        };
        Ok(Self {
            preprocess,
            dtype,
            context,
            want,
            norm,
            normalize: options.normalize,
            width,
            shape,
        })
    }

    pub(super) fn work(&self) -> RequestedWork {
        RequestedWork::Infer {
            context: self.context,
            want: self.want,
        }
    }

    /// Returns the number of values in one answer.
    pub(super) fn n_values(&self) -> usize {
        self.shape.iter().product()
    }

    /// Returns the shape of one answer.
    pub(super) fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Converts one answer to a tensor, normalized if that is asked for.
    pub(super) fn tensor(&self, answer: Answer) -> Result<pb::Tensor, RequestError> {
        match answer {
            Answer::Values(mut values) => {
                if self.normalize {
                    convert::normalize(&mut values, self.width);
                }
                Ok(convert::tensor(&values, &self.shape, self.dtype))
            }
            _ => Err(StageError::Lost.into()),
        }
    }

    /// Returns the options as they are applied, with defaults filled in; the
    /// caller adds the options that only streams have.
    pub(super) fn applied(&self, model: &Model) -> pb::EmbedStreamOptions {
        pb::EmbedStreamOptions {
            preprocess: Some(proto::preprocess_applied(self.preprocess)),
            context: pb::Context::from(self.context).into(),
            pooling: convert::pooling_applied(self.want),
            normalize: self.normalize,
            dtype: self.dtype.into(),
            layers: convert::layers_applied(model, self.want),
            norm: pb::Norm::from(self.norm).into(),
            ..Default::default()
        }
    }
}
