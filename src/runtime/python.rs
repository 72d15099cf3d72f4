//! Finds ONNX Runtime in the Python environment into which the program was
//! installed as a wheel.
//!
//! The wheel of ONNX Runtime has its library only under the versioned name, and
//! in the directory of its Python package, so neither the places beside the
//! program nor the dynamic linker's lead there.

use std::path::{Path, PathBuf};

use crate::runtime::library::LIBRARY;

/// Newest minor version of Python 3 that is looked for: Python 3.14 came out in
/// 2025, and one follows per year. Together with the other parts of a path, 256
/// directories are tried at most.
const PYTHON_MINOR_MAX: u32 = 63;
/// Most files of ONNX Runtime's directory that are looked at; the wheels have
/// fewer than 50.
const FILES_MAX: usize = 1024;
/// Package of ONNX Runtime, and the directory in it that has the library.
const PACKAGE: &str = "onnxruntime/capi";

/// Returns ONNX Runtime's library in the environment of a program at
/// PREFIX/bin: of the newest Python whose packages have one, and of several
/// files the one of the highest version. Packages without a Python of their
/// own, as `pip install --target` writes them, are directly in PREFIX and come
/// last.
pub(super) fn library(program: &Path) -> Option<PathBuf> {
    packages(program).find_map(|packages| newest(&packages.join(PACKAGE)))
}

/// Returns the directory of all packages of the Python environment in which
/// `folder` is ONNX Runtime's; `None` if it is elsewhere.
pub(crate) fn packages_around(folder: &Path) -> Option<&Path> {
    folder
        .ends_with(PACKAGE)
        .then(|| folder.ancestors().nth(2))
        .flatten()
}

/// Directories in which the packages of the program's environment may lie.
fn packages(program: &Path) -> impl Iterator<Item = PathBuf> {
    let folder = program.parent().filter(|folder| folder.ends_with("bin"));
    let prefix = folder.and_then(Path::parent).map(Path::to_owned);
    prefix.into_iter().flat_map(|prefix| {
        let pythons = (0..=PYTHON_MINOR_MAX).rev().flat_map(|minor| {
            // Builds without the global lock have directories of their own.
            [format!("python3.{minor}"), format!("python3.{minor}t")]
        });
        let of_python = {
            let prefix = prefix.clone();
            pythons.flat_map(move |python| {
                // Fedora has compiled packages in lib64, and Debian packages
                // that pip installs for all users in dist-packages.
                let places = [
                    ("lib", "site-packages"),
                    ("lib64", "site-packages"),
                    ("lib", "dist-packages"),
                ];
                places.map(|(lib, packages)| prefix.join(lib).join(&python).join(packages))
            })
        };
        of_python.chain([prefix])
    })
}

/// Returns the library of the highest version in a directory.
fn newest(folder: &Path) -> Option<PathBuf> {
    let files = std::fs::read_dir(folder).ok()?.take(FILES_MAX).flatten();
    let libraries = files.filter_map(|file| {
        let version = version(file.file_name().to_str()?)?;
        let path = file.path();
        path.is_file().then_some((version, path))
    });
    libraries.max().map(|(_, path)| path)
}

/// Parses the version in the library's file name; the name without one counts
/// as the lowest version.
fn version(name: &str) -> Option<Vec<u32>> {
    match name.strip_prefix(LIBRARY)? {
        "" => Some(Vec::new()),
        version => {
            let numbers = version.strip_prefix('.')?.split('.');
            numbers.map(|number| number.parse().ok()).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;

    /// Makes a prefix with these files, and returns the library that a program
    /// in its directory `bin` would find, relative to the prefix.
    fn found(files: &[&str], program: &str) -> Option<String> {
        let prefix = prefix(files);
        let path = library(&prefix.path().join(program))?;
        let path = path.strip_prefix(prefix.path()).unwrap();
        Some(path.to_str().unwrap().to_owned())
    }

    fn prefix(files: &[&str]) -> TempDir {
        let prefix = tempfile::tempdir().unwrap();
        for file in files {
            let path = prefix.path().join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "").unwrap();
        }
        prefix
    }

    const PROGRAM: &str = "bin/imagegpt";

    #[test]
    fn every_layout_of_an_environment_is_known() {
        let name = "onnxruntime/capi/libonnxruntime.so.1.31.1";
        for packages in [
            // A virtual environment, and `pip install --user` in ~/.local.
            "lib/python3.11/site-packages",
            "lib64/python3.12/site-packages",
            // Debian's /usr/local.
            "lib/python3.11/dist-packages",
            "lib/python3.14t/site-packages",
        ] {
            let file = format!("{packages}/{name}");
            assert_eq!(found(&[&file], PROGRAM), Some(file.clone()));
            assert_eq!(found(&[&file], "sbin/imagegpt"), None, "not a prefix");
        }
        // `pip install --target`.
        assert_eq!(found(&[name], PROGRAM).as_deref(), Some(name));
        assert_eq!(found(&[], PROGRAM), None);
        assert_eq!(library(Path::new("imagegpt")), None);
        assert_eq!(library(Path::new("")), None);
    }

    #[test]
    fn the_packages_around_onnx_runtime_are_those_of_its_environment() {
        let around = |folder: &str| packages_around(Path::new(folder)).map(Path::to_owned);
        let packages = "/env/lib/python3.11/site-packages";
        let capi = format!("{packages}/onnxruntime/capi");
        assert_eq!(around(&capi), Some(packages.into()));
        assert_eq!(around("/opt/onnxruntime/lib"), None);
        assert_eq!(around(""), None);
    }

    #[test]
    fn the_newest_python_with_a_library_is_taken() {
        let of = |python: &str| {
            format!("lib/{python}/site-packages/onnxruntime/capi/libonnxruntime.so.1.31.1")
        };
        let (old, new, free) = (of("python3.9"), of("python3.10"), of("python3.10t"));
        assert_eq!(found(&[&old, &new, &free], PROGRAM), Some(new));
        assert_eq!(found(&[&old, &free], PROGRAM), Some(free));
        // One without ONNX Runtime does not hide another's.
        let bare = "lib/python3.13/site-packages/numpy/__init__.py";
        assert_eq!(found(&[&old, bare], PROGRAM), Some(old.clone()));
        // A Python comes before packages that belong to none.
        let target = "onnxruntime/capi/libonnxruntime.so.1.99.0";
        assert_eq!(found(&[target, &old], PROGRAM), Some(old));
    }

    #[test]
    fn the_library_of_the_highest_version_is_taken_and_no_other_file() {
        let folder = "lib/python3.11/site-packages/onnxruntime/capi";
        let file = |name: &str| format!("{folder}/{name}");
        let [plain, low, high] = [
            "libonnxruntime.so",
            "libonnxruntime.so.1.9.0",
            "libonnxruntime.so.1.31.1",
        ]
        .map(file);
        let others = [
            "libonnxruntime.so.1.99.0.debug",
            "libonnxruntime.so.txt",
            "libonnxruntime_providers_shared.so",
            "libonnxruntime.so.1.99.1/x",
        ]
        .map(file);
        let mut files: Vec<&str> = others.iter().map(String::as_str).collect();
        assert_eq!(found(&files, PROGRAM), None);
        files.push(&plain);
        assert_eq!(found(&files, PROGRAM), Some(plain.clone()));
        files.extend([low.as_str(), &high]);
        assert_eq!(found(&files, PROGRAM), Some(high.clone()));
    }
}
