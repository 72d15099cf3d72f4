//! Where `serve --model SOURCE` finds a directory that it can serve: as it is,
//! or compiled once and kept.

use std::path::{Path, PathBuf};

use super::checkpoint::weight_files;
use super::{CompileOptions, CompileProgress, ModelSource, compile_cached};
use crate::model;
use crate::model::manifest;
use crate::runtime::Runtime;

/// Finds the directory to serve for what a user wrote after `--model`. What has
/// weights but no graphs is compiled into the cache, unless it is there.
///
/// # Errors
///
/// When there is no such source, or it cannot be compiled.
pub fn locate(
    source: &ModelSource,
    cache_dir: Option<&Path>,
    options: &CompileOptions,
    runtime: impl FnOnce() -> anyhow::Result<Runtime>,
    progress: &mut dyn CompileProgress,
) -> anyhow::Result<PathBuf> {
    if let ModelSource::Folder(folder) = source
        && (is_servable(folder) || weight_files(folder).is_err())
    {
        // What has neither graphs nor weights is for the model's own checks to
        // complain about.
        return Ok(folder.clone());
    }
    let cache = self::folder(cache_dir)?;
    let (folder, _) = compile_cached(source, &cache, options, &runtime()?, progress)?;
    Ok(folder)
}

fn is_servable(folder: &Path) -> bool {
    folder.join(manifest::FILE).is_file() || model::has_graphs(folder)
}

/// `--cache-dir`, else where the user's caches are.
///
/// # Errors
///
/// When the user has no home.
pub fn folder(given: Option<&Path>) -> anyhow::Result<PathBuf> {
    if let Some(folder) = given {
        return Ok(folder.to_owned());
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
