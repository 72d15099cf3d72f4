//! The shared library, found and loaded once a process.

use std::path::{Path, PathBuf};
use std::sync::Mutex;

use ort::environment::Environment;

use crate::runtime::error::{EngineError, runtime};

/// The library's file name as distributors install it.
pub const LIBRARY: &str = "libonnxruntime.so";
/// Where the project's own set-up puts it, beside the build.
pub const LIBRARY_FOLDER: &str = "onnxruntime";

/// ONNX Runtime allows one environment a process and forgets it when its last
/// user goes, after which no other can be made: so the first stays.
static ENVIRONMENT: Mutex<Option<Environment>> = Mutex::new(None);

/// What to do about the library.
const LIBRARY_HINT: &str = "give the path of a libonnxruntime.so of version 1.24 or newer by \
                            --onnxruntime or ORT_DYLIB_PATH, or run `make setup`";

/// The process's environment, made from `library` the first time.
///
/// # Errors
///
/// When the library is missing or of another version; the text says what to
/// do.
pub fn environment(library: &Path) -> Result<Environment, EngineError> {
    let mut environment = ENVIRONMENT
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    if let Some(environment) = &*environment {
        return Ok(environment.clone());
    }
    // The dynamic linker's own complaint does not get through.
    if library.components().count() > 1 && !library.is_file() {
        return Err(EngineError::Library(format!(
            "{} is not there; {LIBRARY_HINT}",
            library.display()
        )));
    }
    let built = ort::init_from(library)
        .map_err(|error| {
            EngineError::Library(format!(
                "{} cannot be used as ONNX Runtime: {error}; {LIBRARY_HINT}",
                library.display()
            ))
        })?
        .with_name("imagegpt")
        .with_telemetry(false)
        .build()
        .map_err(runtime)?;
    Ok(environment.insert(built).clone())
}

/// Finds the library. A bare name that is given is a file in the current folder,
/// or else one for the dynamic linker to find; if none is given, it lies beside
/// the running program or up to two folders above it (where a build and its tests
/// run), or the dynamic linker finds it.
#[must_use]
pub fn find_library(given: Option<&Path>) -> PathBuf {
    if let Some(path) = given {
        // The dynamic linker looks for a bare name everywhere but here.
        let is_bare = path.components().count() == 1 && path.is_file();
        let here = is_bare.then(|| std::path::absolute(path).ok()).flatten();
        return here.unwrap_or_else(|| path.to_owned());
    }
    let program = std::env::current_exe().unwrap_or_default();
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
        .unwrap_or_else(|| PathBuf::from(LIBRARY))
}

/// The library's version: from its file's name (`libonnxruntime.so.1.31.1`),
/// where links lead to it, else as far as the library itself tells.
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
        // Tests run where this is.
        let here = std::path::absolute("Cargo.toml").unwrap();
        assert_eq!(found("Cargo.toml"), here);
    }
}
