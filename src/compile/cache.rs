//! Where `serve --model SOURCE` finds a directory that it can serve: as it is,
//! or compiled once and kept.

use std::path::{Path, PathBuf};

use super::checkpoint::{Checkpoint, weight_files};
use super::{
    CompileOptions, Manifest, Progress, Provider, Runtime, Source, Step, compile, manifest,
};
use crate::config::CompileConfig;
use crate::model;

/// The directory to serve for what a user wrote after `--model`. What has
/// weights but no graphs is compiled into the cache, unless it is there.
///
/// # Errors
///
/// When there is no such source, or it cannot be compiled.
pub fn locate(
    text: &str,
    config: &CompileConfig,
    provider: Provider,
    runtime: impl FnOnce() -> anyhow::Result<Runtime>,
    progress: &mut dyn Progress,
) -> anyhow::Result<PathBuf> {
    let source = Source::parse(text, config.revision.as_deref());
    if let Source::Folder(folder) = &source
        && (is_servable(folder) || weight_files(folder).is_err())
    {
        // What has neither graphs nor weights is for the model's own checks to
        // complain about.
        return Ok(folder.clone());
    }
    let local = source.fetch(progress)?;
    let checkpoint = Checkpoint::open(&local.folder)?;
    progress.begin(Step::Digest, checkpoint.bytes()?);
    let digest = checkpoint.digest(|bytes| progress.advance(bytes))?;
    let options = CompileOptions {
        precision: config.precision,
        provider,
        tasks: None,
        feature_layer: config.feature_layer,
    };
    let folder = cache(config)?.join(key(&source, &digest, &options));
    if Manifest::read(&folder).is_ok() {
        return Ok(folder);
    }
    let compiled = compile(
        &Source::Folder(local.folder),
        &folder,
        &options,
        &runtime()?,
        progress,
    );
    match compiled {
        Ok(_) => Ok(folder),
        // Another worker may have compiled the same meanwhile.
        Err(_) if Manifest::read(&folder).is_ok() => Ok(folder),
        Err(error) => Err(error.into()),
    }
}

fn is_servable(folder: &Path) -> bool {
    folder.join(manifest::FILE).is_file() || model::has_graphs(folder)
}

/// A name that says what it is to a person, and all that the graphs follow
/// from to a machine.
fn key(source: &Source, digest: &str, options: &CompileOptions) -> String {
    let name: String = source
        .to_string()
        .trim_end_matches('/')
        .rsplit('/')
        .next()
        .unwrap_or_default()
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
        .collect();
    let layer = options
        .feature_layer
        .map_or_else(|| "default".to_owned(), |layer| layer.to_string());
    format!(
        "{name}-{}-{}-{}-layer-{layer}-v{}",
        digest.get(..16).unwrap_or(digest),
        options.precision.name(),
        match options.provider {
            Provider::Cpu => "cpu",
            Provider::Cuda => "cuda",
        },
        env!("CARGO_PKG_VERSION"),
    )
}

/// `--cache-dir`, else where the user's caches are.
fn cache(config: &CompileConfig) -> anyhow::Result<PathBuf> {
    if let Some(folder) = &config.cache_dir {
        return Ok(folder.clone());
    }
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    set("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::home_dir().map(|home| home.join(".cache")))
        .map(|folder| folder.join("imagegpt"))
        .ok_or_else(|| {
            anyhow::anyhow!("there is no home folder to keep compiled models in; set --cache-dir")
        })
}
