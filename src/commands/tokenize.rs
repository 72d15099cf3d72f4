//! `imagegpt tokenize`: what the model sees of images.

use std::io::Write;
use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use super::output::{Folder, json};
use super::{CommandOutcome, EachConfig, Session};
use crate::client::Client;
use crate::files::printable;
use crate::imaging::render;

#[derive(Debug, Clone, Args)]
pub struct TokenizeArgs {
    /// Write a PNG of each image's tokens in the palette's colors into this
    /// folder
    #[arg(long, value_name = "DIR")]
    pub preview: Option<PathBuf>,

    /// Pixels of a preview for one of the model's, without smoothing
    #[arg(long, default_value_t = 8, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=32))]
    pub scale: u8,

    #[command(flatten)]
    pub each: EachConfig,
}

#[derive(Serialize)]
struct Line<'a> {
    file: &'a str,
    ids: &'a [u16],
    #[serde(skip_serializing_if = "Option::is_none")]
    preview: Option<PathBuf>,
    model_digest: &'a str,
}

pub(super) async fn run(
    args: &TokenizeArgs,
    session: &Session,
    out: &mut impl Write,
) -> anyhow::Result<CommandOutcome> {
    let preview = args.preview.as_deref();
    let mut folder = preview
        .map(|path| Folder::make("--preview", path))
        .transpose()?;
    let call = |mut client: Client, images, preprocess| async move {
        client.tokenize(images, preprocess).await
    };
    let take = |file: &str, ids: Vec<u32>| {
        let ids = session.tokens(&ids)?;
        let preview = match &mut folder {
            Some(folder) => Some(folder.write(file, &session.png(&ids, args.scale)?)?),
            None => None,
        };
        if args.each.json {
            return json(
                out,
                &Line {
                    file,
                    ids: &ids,
                    preview,
                    model_digest: &session.model.digest,
                },
            );
        }
        let ids: Vec<String> = ids.iter().map(u16::to_string).collect();
        writeln!(out, "{}\t{}", printable(file), ids.join(" "))?;
        Ok(())
    };
    session.each_input(&args.each, call, take).await
}

impl Session {
    /// Tokens as a PNG file in the palette's colors.
    pub(super) fn png(&self, tokens: &[u16], scale: u8) -> anyhow::Result<Vec<u8>> {
        let (side, palette) = (self.model.side as usize, &self.model.palette_rgb8);
        let compression = png::Compression::Balanced;
        Ok(render::png(
            tokens,
            palette,
            side,
            scale.into(),
            compression,
        )?)
    }
}
