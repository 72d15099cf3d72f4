//! Finds the directory for `serve --model SOURCE`: the source itself, or its
//! compiled form, which is compiled once and cached.

use std::path::{Path, PathBuf};

use super::checkpoint::weight_files;
use super::{CompileOptions, CompileProgress, ModelSource, compile_cached};
use crate::model;
use crate::model::manifest;
use crate::runtime::Runtime;

/// Finds the directory to serve for the value of `--model`. A source that has
/// weights but no graphs is compiled into the cache, unless it is cached
/// already.
///
/// # Errors
///
/// When the source does not exist or cannot be compiled.
pub fn locate(
    source: &ModelSource,
    cache_dir: Option<&Path>,
    options: &CompileOptions,
    runtime: impl FnOnce() -> anyhow::Result<Runtime>,
    progress: &mut dyn CompileProgress,
) -> anyhow::Result<PathBuf> {
    source.check()?;
    if let ModelSource::Folder(folder) = source
        && (is_servable(folder) || weight_files(folder).is_err())
    {
        // A directory with neither graphs nor weights is refused later, by the
        // model's own checks.
        return Ok(folder.clone());
    }
    let cache = self::folder(cache_dir)?;
    let (folder, _) = compile_cached(source, &cache, options, &runtime()?, progress)?;
    Ok(folder)
}

fn is_servable(folder: &Path) -> bool {
    folder.join(manifest::FILE).is_file() || model::has_graphs(folder)
}

/// Returns the cache directory: `--cache-dir`, or else `imagegpt` in the user's
/// cache directory.
///
/// # Errors
///
/// When the user has no home directory.
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
            anyhow::anyhow!(
                "the home directory is unknown, so compiled models cannot be cached; set \
                 --cache-dir"
            )
        })
}
