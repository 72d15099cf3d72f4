//! Command `imagegpt tokenize`: the tokens that the model sees of images.

use std::io::Write;
use std::panic::AssertUnwindSafe;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use clap::Args;
use serde::Serialize;

use super::input::{CallLimits, Inputs};
use super::output::{Folder, json};
use super::serve::open_model;
use super::tokens::TokenFacts;
use super::{Calls, CommandOutcome, EachConfig, Session};
use crate::files::printable;
use crate::imaging::{DecodeBudget, ImageInput, PreprocessOptions, Preprocessor};
use crate::serve::config::ServeConfig;
use crate::serve::error::StageError;
use crate::serve::worker::{n_preprocess_threads, preprocessor};

#[derive(Debug, Clone, Args)]
pub struct TokenizeArgs {
    /// Write a PNG of each image's tokens, in the palette's colors, into this
    /// directory
    #[arg(long, value_name = "DIR")]
    pub preview: Option<PathBuf>,

    /// Side in pixels of the preview's square for each token, without smoothing
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

/// Lets a worker compute the tokens.
pub(super) async fn run(
    args: &TokenizeArgs,
    session: &Session,
    out: &mut impl Write,
) -> anyhow::Result<CommandOutcome> {
    let preprocess = args.each.preprocess.to_pb();
    let call = |images| {
        let mut client = session.client.clone();
        async move { client.tokenize(images, preprocess).await }
    };
    let calls = Calls {
        limits: session.limits,
        n_at_once: super::CALLS,
    };
    print(args, &session.tokens, calls, call, out).await
}

/// Computes the tokens in this process, as a worker with these flags would.
/// Needs neither the model's graphs nor ONNX Runtime.
pub(super) async fn run_here(
    args: &TokenizeArgs,
    config: ServeConfig,
    out: &mut impl Write,
) -> anyhow::Result<CommandOutcome> {
    let limits = &config.limits;
    let calls = Calls {
        limits: CallLimits::one(limits),
        n_at_once: n_preprocess_threads(&config),
    };
    let cpu_time_max = limits.decode_cpu_time_max;
    let open = move || {
        let (model, _) = open_model(&config)?;
        let preprocessor = preprocessor(&model, &config.limits)?;
        anyhow::Ok((TokenFacts::from(&model), Arc::new(preprocessor)))
    };
    let (facts, preprocessor) = tokio::task::spawn_blocking(open).await??;
    let options = args.each.preprocess.options();
    let call = |images: Vec<Bytes>| {
        let preprocessor = Arc::clone(&preprocessor);
        let tokenize = move || {
            let images = images.into_iter();
            let ids = images.map(|image| ids(&preprocessor, image, options, cpu_time_max));
            ids.collect()
        };
        async move { Ok(tokio::task::spawn_blocking(tokenize).await?) }
    };
    print(args, &facts, calls, call, out).await
}

/// Computes an image's tokens, or the message that a worker would send for the
/// image.
fn ids(
    preprocessor: &Preprocessor,
    image: Bytes,
    options: PreprocessOptions,
    cpu_time_max: Duration,
) -> Result<Vec<u32>, String> {
    let budget = DecodeBudget::new(&|| false, cpu_time_max);
    let input = ImageInput::Encoded(image);
    // Panics of decoders are contained in the decoders; a panic from elsewhere
    // must not fail the other images.
    let tokenize = AssertUnwindSafe(|| preprocessor.tokenize(&input, options, &budget));
    match std::panic::catch_unwind(tokenize) {
        Ok(Ok(tokenized)) => Ok(tokenized.tokens.iter().copied().map(u32::from).collect()),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(StageError::Lost.to_string()),
    }
}

/// Prints and draws the tokens that `call` computes for the images.
async fn print<F>(
    args: &TokenizeArgs,
    facts: &TokenFacts,
    calls: Calls,
    call: impl Fn(Vec<Bytes>) -> F,
    out: &mut impl Write,
) -> anyhow::Result<CommandOutcome>
where
    F: Future<Output = anyhow::Result<Vec<Result<Vec<u32>, String>>>>,
{
    let preview = args.preview.as_deref();
    let mut folder = preview
        .map(|path| Folder::make("--preview", path))
        .transpose()?;
    let take = |file: &str, ids: Vec<u32>| {
        let ids = facts.check(&ids)?;
        let preview = match &mut folder {
            Some(folder) => Some(folder.write(file, &facts.png(&ids, args.scale)?)?),
            None => None,
        };
        if args.each.json {
            return json(
                out,
                &Line {
                    file,
                    ids: &ids,
                    preview,
                    model_digest: &facts.model_digest,
                },
            );
        }
        let ids: Vec<String> = ids.iter().map(u16::to_string).collect();
        writeln!(out, "{}\t{}", printable(file), ids.join(" "))?;
        Ok(())
    };
    calls.each(Inputs::new(&args.each.input)?, call, take).await
}
