//! Tokens as commands show them, whoever made them.

use anyhow::Context as _;

use crate::imaging::render;
use crate::model::Model;
use crate::proto::pb;

/// What a model's tokens are shown by.
#[derive(Debug, Clone)]
pub(super) struct TokenFacts {
    pub(super) model_digest: String,
    /// Side in pixels of the model's images.
    pub(super) side: usize,
    /// Tokens of an image.
    n_positions: usize,
    /// Three bytes a color.
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
    /// Tokens as this crate has them.
    ///
    /// # Errors
    ///
    /// When they are not those of an image of this model.
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

    /// Tokens as a PNG file in the palette's colors.
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
