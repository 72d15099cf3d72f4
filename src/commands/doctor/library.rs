//! ONNX Runtime's library, and the libraries that its CUDA provider needs.

use std::path::{Path, PathBuf};

use procfs::process::{MMapPath, MemoryMaps, Process};
use serde::{Deserialize, Serialize};

use super::child::ChildLost;
use crate::engine::onnx;
use crate::runtime;
use crate::runtime::cuda::{CudaPlace, Linked, PROVIDER_FILES, is_of_cuda};
use crate::runtime::library::LIBRARY;

/// Findings about ONNX Runtime's library.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Library {
    pub(super) path: PathBuf,
    /// Minor version (31 of 1.31), or the reason why the library cannot be
    /// used.
    pub(super) minor: Result<u32, String>,
    /// Directory that the library was loaded from.
    pub(super) folder: Option<PathBuf>,
}

/// Findings about the CUDA provider beside ONNX Runtime's library.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct CudaProvider {
    /// Files of the provider that do not exist.
    pub(super) missing_files: Vec<String>,
    /// Libraries of CUDA that the provider is linked with; empty if its files
    /// could not be read.
    pub(super) needed: Vec<Needed>,
    /// Reason why a file is not a library for this machine.
    pub(super) unreadable: Option<String>,
    /// Fate of the child process that loaded the libraries, if it gave no
    /// answer.
    pub(super) lost: Option<String>,
}

/// A library that another library is linked with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Needed {
    pub(super) name: String,
    /// Error of the dynamic linker, if the library cannot be loaded.
    pub(super) error: Option<String>,
    /// True if the library lies beside ONNX Runtime's library, where the
    /// published provider does not look.
    pub(super) is_beside: bool,
}

impl Library {
    /// Finds and loads the library, as `serve` would.
    pub(super) fn find(given: Option<&Path>) -> Self {
        let path = onnx::find_library(given);
        let minor = match runtime::load(&path) {
            Err(words) => Err(words),
            Ok(()) => {
                runtime::minor_version(&path).ok_or_else(|| "not ONNX Runtime 1.x".to_owned())
            }
        };
        let folder = minor.is_ok().then(|| folder(&path)).flatten();
        Self {
            path,
            minor,
            folder,
        }
    }
}

impl Library {
    /// Finding for a child process that gave no answer.
    pub(super) fn lost(given: Option<&Path>, lost: &ChildLost) -> Self {
        Self {
            path: onnx::find_library(given),
            minor: Err(lost.to_string()),
            folder: None,
        }
    }
}

/// Returns the directory that the file is really in. A library that the dynamic
/// linker found by its bare name is looked up in the memory map of this
/// process.
fn folder(path: &Path) -> Option<PathBuf> {
    let file = match path.components().count() {
        1 => mapped(Process::myself().and_then(|this| this.maps()).ok()?)?,
        _ => path.to_owned(),
    };
    let file = std::fs::canonicalize(file).ok()?;
    file.parent().map(Path::to_owned)
}

fn mapped(maps: MemoryMaps) -> Option<PathBuf> {
    let files = maps.into_iter().filter_map(|map| match map.pathname {
        MMapPath::Path(file) => Some(file),
        _ => None,
    });
    files.into_iter().find(|path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with(LIBRARY)
    })
}

impl CudaProvider {
    /// Looks at the provider's files in `folder`, and loads the libraries that
    /// they need as a worker would.
    pub(super) fn find(folder: &Path) -> Self {
        let missing_files: Vec<String> = PROVIDER_FILES
            .into_iter()
            .filter(|name| !folder.join(name).is_file())
            .map(str::to_owned)
            .collect();
        if !missing_files.is_empty() {
            return Self {
                missing_files,
                ..Self::default()
            };
        }
        let [shared, cuda] = PROVIDER_FILES.map(|name| Linked::read(&folder.join(name)));
        match shared.and(cuda) {
            Ok(linked) => {
                let place = CudaPlace::new(folder, linked.looks_beside);
                let names = linked.names.into_iter().filter(|name| is_of_cuda(name));
                Self {
                    needed: names.map(|name| load(&place, name)).collect(),
                    ..Self::default()
                }
            }
            Err(reason) => Self {
                unreadable: Some(reason),
                ..Self::default()
            },
        }
    }

    /// Finding for a child process that gave no answer. The provider's files
    /// exist, because loading the libraries begins only after that check.
    pub(super) fn lost(lost: &ChildLost) -> Self {
        Self {
            lost: Some(lost.to_string()),
            ..Self::default()
        }
    }

    /// True if all files of the provider exist and are libraries.
    pub(super) fn is_whole(&self) -> bool {
        self.missing_files.is_empty() && self.unreadable.is_none()
    }

    /// Major version of the CUDA that the provider was built for, taken from
    /// the names of libraries that carry this number.
    pub(super) fn cuda_major(&self) -> Option<i32> {
        let numbered = ["libcudart.so.", "libcublas.so.", "libcublasLt.so."];
        let names = self.needed.iter().map(|needed| needed.name.as_str());
        names
            .filter_map(|name| numbered.iter().find_map(|start| name.strip_prefix(start)))
            .find_map(|number| number.split('.').next()?.parse().ok())
    }
}

fn load(place: &CudaPlace<'_>, name: String) -> Needed {
    Needed {
        error: place.load(&name).err(),
        is_beside: place.folder.join(&name).is_file(),
        name,
    }
}

#[cfg(test)]
mod tests {
    use procfs::FromRead as _;

    use super::*;

    #[test]
    fn what_is_named_like_the_provider_and_is_none_is_told() {
        let program = std::env::current_exe().unwrap();
        for junk in PROVIDER_FILES {
            let folder = tempfile::tempdir().unwrap();
            for name in PROVIDER_FILES {
                std::fs::copy(&program, folder.path().join(name)).unwrap();
            }
            std::fs::write(folder.path().join(junk), "junk").unwrap();
            let reason = CudaProvider::find(folder.path()).unreadable.unwrap();
            assert!(reason.contains(junk), "{reason}");
            // Only the machine type in the header (at 18) differs.
            let mut foreign = std::fs::read(&program).unwrap();
            foreign[18..20].copy_from_slice(&8_u16.to_le_bytes());
            std::fs::write(folder.path().join(junk), foreign).unwrap();
            let reason = CudaProvider::find(folder.path()).unreadable.unwrap();
            assert!(reason.contains("another kind of processor"), "{reason}");
        }
    }

    #[test]
    fn a_folder_without_the_provider_is_told_by_its_files() {
        let folder = tempfile::tempdir().unwrap();
        let provider = CudaProvider::find(folder.path());
        assert_eq!(provider.missing_files, PROVIDER_FILES);
        assert_eq!(provider.cuda_major(), None);
        for name in PROVIDER_FILES {
            std::fs::copy(std::env::current_exe().unwrap(), folder.path().join(name)).unwrap();
        }
        let provider = CudaProvider::find(folder.path());
        assert!(provider.missing_files.is_empty());
        assert_eq!(provider.needed, [], "nothing of CUDA in a test");
        assert_eq!(provider.unreadable, None);
    }

    #[test]
    fn a_library_is_looked_for_where_the_provider_would() {
        let folder = tempfile::tempdir().unwrap();
        let name = "libcublas-not-there.so.13";
        let load = |looks_beside| {
            let place = CudaPlace::new(folder.path(), looks_beside);
            load(&place, name.to_owned())
        };
        let missing = load(true);
        assert!(missing.error.unwrap().contains(name));
        assert!(!missing.is_beside);
        std::fs::copy(onnx::find_library(None), folder.path().join(name)).unwrap();
        let beside = load(false);
        assert!(beside.error.is_some() && beside.is_beside);
        assert_eq!(load(true).error, None);
    }

    #[test]
    fn the_version_of_cuda_is_that_of_its_libraries() {
        let provider = |names: &[&str]| CudaProvider {
            needed: names
                .iter()
                .map(|name| Needed {
                    name: (*name).to_owned(),
                    error: None,
                    is_beside: false,
                })
                .collect(),
            ..CudaProvider::default()
        };
        // cuRAND has version numbers of its own.
        let of = |names: &[&str]| provider(names).cuda_major();
        assert_eq!(of(&["libcurand.so.10", "libcudart.so.13"]), Some(13));
        assert_eq!(of(&["libcublasLt.so.12"]), Some(12));
        assert_eq!(of(&["libcurand.so.10"]), None);
    }

    #[test]
    fn a_library_that_the_system_found_is_found_in_the_maps() {
        let maps = "7f0-7f1 r--p 0 08:01 7 /lib/x86_64-linux-gnu/libc.so.6\n\
                    7f2-7f3 r--p 0 08:01 8 /opt/ort/libonnxruntime.so.1.31.1\n";
        let mapped = |maps: &str| mapped(MemoryMaps::from_read(maps.as_bytes()).unwrap());
        let found = mapped(maps).unwrap();
        assert_eq!(found, Path::new("/opt/ort/libonnxruntime.so.1.31.1"));
        assert_eq!(mapped("7f0-7f1 r--p 0 00:00 0 \n"), None);
    }
}
