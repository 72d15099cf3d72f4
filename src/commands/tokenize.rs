//! `imagegpt tokenize`: what the model sees of images.

use std::io::Write;
use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use super::input::Inputs;
use super::output::{Folder, json};
use super::{InputConfig, Outcome, PreprocessConfig, Session, WorkerConfig};
use crate::picture;

#[derive(Debug, Clone, Args)]
pub struct TokenizeArgs {
    #[command(flatten)]
    pub input: InputConfig,

    /// Write a PNG of each image's tokens in the palette's colors into this
    /// folder
    #[arg(long, value_name = "DIR")]
    pub preview: Option<PathBuf>,

    /// Pixels of a preview for one of the model's, without smoothing
    #[arg(long, default_value_t = 8, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=32))]
    pub scale: u8,

    #[command(flatten)]
    pub preprocess: PreprocessConfig,

    /// Print one JSON object an image. Otherwise a line is the file, a tab and
    /// the token ids
    #[arg(long)]
    pub json: bool,

    #[command(flatten)]
    pub worker: WorkerConfig,
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
) -> anyhow::Result<Outcome> {
    let preprocess = args.preprocess.to_pb();
    let preview = args.preview.as_deref();
    let mut folder = preview
        .map(|path| Folder::make("--preview", path))
        .transpose()?;
    let call = |mut client: crate::rpc::client::Client, images| async move {
        client.tokenize(images, preprocess).await
    };
    let take = |file: &str, ids: Vec<u32>| {
        let ids = session.tokens(&ids)?;
        let preview = match &mut folder {
            Some(folder) => Some(folder.write(file, &session.png(&ids, args.scale)?)?),
            None => None,
        };
        if args.json {
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
        writeln!(out, "{file}\t{}", ids.join(" "))?;
        Ok(())
    };
    session.each(Inputs::new(&args.input)?, call, take).await
}

impl Session {
    /// Tokens as a PNG file in the palette's colors.
    pub(super) fn png(&self, tokens: &[u16], scale: u8) -> anyhow::Result<Vec<u8>> {
        let (side, palette) = (self.model.side as usize, &self.model.palette_rgb8);
        let compression = png::Compression::Balanced;
        Ok(picture::png(
            tokens,
            palette,
            side,
            scale.into(),
            compression,
        )?)
    }
}
