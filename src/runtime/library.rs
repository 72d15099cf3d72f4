//! Finds the shared library of ONNX Runtime, and loads it once per process.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, Once, OnceLock};

use ort::environment::Environment;

use crate::runtime::error::{EngineError, runtime};
use crate::runtime::{cuda, python};

/// The library's file name as distributors install it.
pub const LIBRARY: &str = "libonnxruntime.so";
/// Directory beside the build in which `make setup` puts the library.
pub const LIBRARY_FOLDER: &str = "onnxruntime";

/// The process's environment, which is never dropped: ONNX Runtime allows one
/// environment per process, and none can be created after the last use of the
/// first.
static ENVIRONMENT: Mutex<Option<Environment>> = Mutex::new(None);

/// Library of [`ENVIRONMENT`].
static LOADED: OnceLock<PathBuf> = OnceLock::new();

/// Remedy for a library that cannot be used.
const LIBRARY_HINT: &str = "set --onnxruntime or ORT_DYLIB_PATH to the path of a libonnxruntime.so \
                            of version 1.24 or newer, or install one beside the program: `pip \
                            install 'imagegpt[cpu]'`, or `make setup` in a checkout";

/// Returns the process's environment, created from `library` on the first call.
///
/// # Errors
///
/// When the library is missing or has another version; the text says what to
/// do.
pub fn environment(library: &Path) -> Result<Environment, EngineError> {
    let mut environment = ENVIRONMENT
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    if let Some(environment) = &*environment {
        return Ok(environment.clone());
    }
    // The dynamic linker's own error text would be lost.
    if library.components().count() > 1 && !library.is_file() {
        return Err(EngineError::Library(format!(
            "{} does not exist; {LIBRARY_HINT}",
            library.display()
        )));
    }
    let built = ort::init_from(library)
        .map_err(|error| {
            EngineError::Library(format!(
                "{} cannot be loaded as ONNX Runtime: {error}; {LIBRARY_HINT}",
                library.display()
            ))
        })?
        .with_name("imagegpt")
        .with_telemetry(false)
        .build()
        .map_err(runtime)?;
    LOADED.get_or_init(|| library.to_owned());
    Ok(environment.insert(built).clone())
}

/// Oldest minor version of ONNX Runtime 1 whose CUDA provider is accepted: the
/// one that was run on a GPU. Up to at least 1.24.2, the norm that adds to the
/// residual stream overflowed in fp16, and gave zeros without an error.
pub const CUDA_MINOR_VERSION_MIN: u32 = 31;

/// Refuses the CUDA provider of a library that is too old for it.
///
/// # Errors
///
/// When the process's library is older than [`CUDA_MINOR_VERSION_MIN`].
pub(super) fn check_for_cuda() -> Result<(), String> {
    static MINOR: OnceLock<Option<u32>> = OnceLock::new();
    let minor = MINOR.get_or_init(|| ort::util::probe(LOADED.get()?));
    check_minor_for_cuda(*minor)
}

/// Refuses a minor version. An unknown version is accepted, since the library
/// has been loaded as a version that is supported.
fn check_minor_for_cuda(minor: Option<u32>) -> Result<(), String> {
    match minor {
        Some(minor) if minor < CUDA_MINOR_VERSION_MIN => Err(format!(
            "ONNX Runtime 1.{minor} is too old for GPUs, where norms in fp16 may overflow to zeros \
             without an error; use 1.{CUDA_MINOR_VERSION_MIN} or newer (--onnxruntime)"
        )),
        _ => Ok(()),
    }
}

/// Loads the libraries of CUDA that the provider of the process's library
/// needs, once.
pub(super) fn preload_cuda() {
    static DONE: Once = Once::new();
    DONE.call_once(|| {
        if let Some(library) = LOADED.get() {
            cuda::preload(library);
        }
    });
}

/// Finds the library. A given name without a directory is a file in the current
/// directory, or else a library that the dynamic linker finds. Without a given
/// name, the library is beside the running program or up to two directories
/// above it (where a build and its tests run), or in the Python environment
/// into which the program was installed, or else the dynamic linker finds it.
#[must_use]
pub fn find_library(given: Option<&Path>) -> PathBuf {
    if let Some(path) = given {
        // The dynamic linker does not look in the current directory.
        let is_bare = path.components().count() == 1 && path.is_file();
        let here = is_bare.then(|| std::path::absolute(path).ok()).flatten();
        return here.unwrap_or_else(|| path.to_owned());
    }
    find_beside(&std::env::current_exe().unwrap_or_default())
}

/// Finds the library of a program at this path.
fn find_beside(program: &Path) -> PathBuf {
    program
        .ancestors()
        .skip(1)
        .take(3)
        .flat_map(|folder| {
            [
                folder.join(LIBRARY),
                folder.join(LIBRARY_FOLDER).join(LIBRARY),
            ]
        })
        .find(|path| path.is_file())
        .or_else(|| python::library(program))
        .unwrap_or_else(|| PathBuf::from(LIBRARY))
}

/// Returns the library's version: from its file name
/// (`libonnxruntime.so.1.31.1`, to which links are followed), or else the
/// version that the library reports.
pub(crate) fn version(library: &Path) -> String {
    let file = std::fs::canonicalize(library).unwrap_or_default();
    let name = file.file_name().unwrap_or_default().to_string_lossy();
    match name.split_once(".so.") {
        Some((_, version)) => version.to_owned(),
        None => ort::util::probe(library)
            .map_or_else(|| "unknown".to_owned(), |minor| format!("1.{minor}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_given_library_is_taken_as_it_is() {
        let found = |given| find_library(Some(Path::new(given)));
        assert_eq!(found("/x/y.so"), Path::new("/x/y.so"));
        assert_eq!(found("y.so"), Path::new("y.so"), "for the linker");
        // Tests run in the package's directory.
        let here = std::path::absolute("Cargo.toml").unwrap();
        assert_eq!(found("Cargo.toml"), here);
    }

    #[test]
    fn gpus_need_a_newer_version() {
        assert_eq!(check_minor_for_cuda(None), Ok(()));
        assert_eq!(check_minor_for_cuda(Some(31)), Ok(()));
        let error = check_minor_for_cuda(Some(30)).unwrap_err();
        assert!(error.starts_with("ONNX Runtime 1.30 is too old"), "{error}");
        assert!(
            error.ends_with("use 1.31 or newer (--onnxruntime)"),
            "{error}"
        );
    }

    #[test]
    fn a_library_beside_the_program_comes_before_that_of_a_python() {
        let root = tempfile::tempdir().unwrap();
        let file = |path: &str| {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, "").unwrap();
            path
        };
        let program = root.path().join("env/bin/imagegpt");
        assert_eq!(find_beside(&program), Path::new(LIBRARY), "for the linker");
        // From the last place to the first.
        for place in [
            "env/lib/python3.11/site-packages/onnxruntime/capi/libonnxruntime.so.1.31.1",
            "onnxruntime/libonnxruntime.so",
            "libonnxruntime.so",
            "env/onnxruntime/libonnxruntime.so",
            "env/bin/libonnxruntime.so",
        ] {
            let library = file(place);
            assert_eq!(find_beside(&program), library);
        }
    }
}
