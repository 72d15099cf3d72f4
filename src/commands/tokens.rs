//! Tokens as commands show them, whether a worker or this process computed
//! them.

use anyhow::Context as _;

use crate::imaging::render;
use crate::model::Model;
use crate::proto::pb;

/// Facts about a model that its tokens are shown with.
#[derive(Debug, Clone)]
pub(super) struct TokenFacts {
    pub(super) model_digest: String,
    /// Side in pixels of the model's images.
    pub(super) side: usize,
    /// Tokens per image.
    n_positions: usize,
    /// Palette with three bytes per color.
    palette_rgb8: Vec<u8>,
}

impl From<&pb::GetModelResponse> for TokenFacts {
    fn from(model: &pb::GetModelResponse) -> Self {
        Self {
            model_digest: model.digest.clone(),
            side: model.side as usize,
            n_positions: model.positions as usize,
            palette_rgb8: model.palette_rgb8.to_vec(),
        }
    }
}

impl From<&Model> for TokenFacts {
    fn from(model: &Model) -> Self {
        Self {
            model_digest: model.digest.clone(),
            side: model.side as usize,
            n_positions: model.positions(),
            palette_rgb8: model.palette_rgb8(),
        }
    }
}

impl TokenFacts {
    /// Checks tokens, and converts them to this crate's type.
    ///
    /// # Errors
    ///
    /// When the tokens are not those of an image of this model.
    pub(super) fn check(&self, ids: &[u32]) -> anyhow::Result<Vec<u16>> {
        let n_colors = self.palette_rgb8.len() / 3;
        let token = |&id: &u32| {
            u16::try_from(id)
                .ok()
                .filter(|&id| usize::from(id) < n_colors)
        };
        let tokens: Option<Vec<u16>> = ids.iter().map(token).collect();
        tokens
            .filter(|tokens| tokens.len() == self.n_positions)
            .context("the worker sent tokens that do not fit its model")
    }

    /// Draws tokens as a PNG file in the palette's colors.
    ///
    /// # Errors
    ///
    /// When the file cannot be made.
    pub(super) fn png(&self, tokens: &[u16], scale: u8) -> anyhow::Result<Vec<u8>> {
        let compression = png::Compression::Balanced;
        Ok(render::png(
            tokens,
            &self.palette_rgb8,
            self.side,
            scale.into(),
            compression,
        )?)
    }
}
