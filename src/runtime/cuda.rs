//! Libraries of CUDA that ONNX Runtime's CUDA provider is linked with, and where
//! they are.
//!
//! The dynamic linker does not look into a Python environment, where the
//! packages nvidia-cublas and the like have these libraries. A library that is
//! loaded by its path first is then found by its name, so they are loaded
//! before the provider.

use std::fs::File;
use std::path::{Path, PathBuf};

use object::elf::{DT_NEEDED, DT_RPATH, DT_RUNPATH, EM_AARCH64, EM_X86_64, FileHeader64, Machine};
use object::read::elf::{Dyn as _, FileHeader as _};
use object::{Endianness, ReadCache};

use crate::runtime::{load, python};

/// Files of the CUDA provider, beside ONNX Runtime's library, which loads the
/// second file through the first.
pub(crate) const PROVIDER_FILES: [&str; 2] = [
    "libonnxruntime_providers_shared.so",
    "libonnxruntime_providers_cuda.so",
];
/// Library of the NVIDIA driver that the provider is linked with; part of the
/// driver, not of CUDA.
const DRIVER: &str = "libcuda.so.1";
/// Most packages of NVIDIA's that are looked into; an environment has about 15.
const PACKAGES_MAX: usize = 256;

/// Directories in which the libraries of a CUDA provider may be, besides those
/// of the dynamic linker.
pub(crate) struct CudaPlace<'f> {
    /// Directory of the provider.
    pub(crate) folder: &'f Path,
    /// True if the dynamic linker searches the provider's own directory first.
    looks_beside: bool,
    /// Directories of NVIDIA's packages in the provider's Python environment.
    packages: Vec<PathBuf>,
}

impl<'f> CudaPlace<'f> {
    pub(crate) fn new(folder: &'f Path, looks_beside: bool) -> Self {
        let nvidia = python::packages_around(folder).map(|packages| packages.join("nvidia"));
        let entries = nvidia.and_then(|nvidia| std::fs::read_dir(nvidia).ok());
        let mut packages: Vec<PathBuf> = entries
            .into_iter()
            .flatten()
            .take(PACKAGES_MAX)
            .flatten()
            .map(|package| package.path().join("lib"))
            .collect();
        packages.sort_unstable();
        Self {
            folder,
            looks_beside,
            packages,
        }
    }

    /// Loads a library: from the provider's directory if the provider searches
    /// that, or else from where the dynamic linker finds it, or else from the
    /// Python environment. So LD_LIBRARY_PATH goes before the environment.
    ///
    /// # Errors
    ///
    /// When the library cannot be loaded; the text is the dynamic linker's.
    pub(crate) fn load(&self, name: &str) -> Result<(), String> {
        let beside = self.folder.join(name);
        if self.looks_beside && beside.is_file() {
            return load(&beside);
        }
        load(Path::new(name)).or_else(|error| {
            let mut files = self.packages.iter().map(|folder| folder.join(name));
            match files.find(|file| file.is_file()) {
                Some(file) => load(&file),
                None => Err(error),
            }
        })
    }
}

/// Loads the libraries of CUDA that the provider beside `library` needs, if the
/// library is in a Python environment. A library that cannot be loaded is left
/// to the provider, whose error names it.
pub(super) fn preload(library: &Path) {
    let Some(folder) = library.parent() else {
        return;
    };
    if python::packages_around(folder).is_none() {
        return;
    }
    let [_, provider] = PROVIDER_FILES.map(|name| folder.join(name));
    // A build for CPUs has no provider.
    let Ok(linked) = Linked::read(&provider) else {
        return;
    };
    let place = CudaPlace::new(folder, linked.looks_beside);
    for name in linked.names.iter().filter(|name| is_of_cuda(name)) {
        if let Err(error) = place.load(name) {
            tracing::debug!(name, error, "a library of CUDA cannot be loaded");
        }
    }
}

/// True for libraries of CUDA. The other libraries that the provider is linked
/// with are left out: the C library and similar ones are loaded already, with
/// ONNX Runtime, and the driver has a check of its own.
pub(crate) fn is_of_cuda(name: &str) -> bool {
    name.starts_with("libcu") && name != DRIVER || name.starts_with("libnv")
}

/// Libraries that a library is linked with.
#[derive(Default)]
pub(crate) struct Linked {
    pub(crate) names: Vec<String>,
    /// True if the dynamic linker searches the library's own directory first.
    pub(crate) looks_beside: bool,
}

impl Linked {
    /// Reads the libraries that a library is linked with from its dynamic
    /// section. Only this section is read of a file of hundreds of megabytes.
    ///
    /// # Errors
    ///
    /// When the file is no library for this machine.
    pub(crate) fn read(file: &Path) -> Result<Self, String> {
        let opened = File::open(file).map_err(|error| format!("{}: {error}", file.display()))?;
        let data = ReadCache::new(opened);
        let linked = || -> anyhow::Result<Self> {
            let mut linked = Self::default();
            let header = FileHeader64::<Endianness>::parse(&data)?;
            let endian = header.endian()?;
            if let Some(machine) = machine()
                && header.e_machine(endian) != machine
            {
                anyhow::bail!("the file is for another kind of processor");
            }
            let sections = header.sections(endian, &data)?;
            let Some((entries, strings)) = sections.dynamic(endian, &data)? else {
                return Ok(linked);
            };
            let strings = sections.strings(endian, &data, strings)?;
            for entry in entries {
                let text = || -> object::Result<String> {
                    let text = entry.string(endian, strings)?;
                    Ok(String::from_utf8_lossy(text).into_owned())
                };
                match entry.tag(endian) {
                    DT_NEEDED => linked.names.push(text()?),
                    DT_RPATH | DT_RUNPATH => linked.looks_beside |= text()?.contains("$ORIGIN"),
                    _ => {}
                }
            }
            Ok(linked)
        };
        linked().map_err(|error| format!("{} is not a library: {error}", file.display()))
    }
}

/// Machine type in the headers of libraries for this machine.
fn machine() -> Option<Machine> {
    match std::env::consts::ARCH {
        "x86_64" => Some(EM_X86_64),
        "aarch64" => Some(EM_AARCH64),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::library::find_library;

    #[test]
    fn a_library_says_what_it_is_linked_with() {
        // This test's own binary is linked with the C library.
        let linked = Linked::read(&std::env::current_exe().unwrap()).unwrap();
        let mut names = linked.names.iter();
        assert!(names.any(|name| name.starts_with("libc.so")));
        let text = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(
            text.path(),
            "not a library, though long enough for a header of one",
        )
        .unwrap();
        let reason = Linked::read(text.path()).map(|linked| linked.names);
        let reason = reason.unwrap_err();
        assert!(reason.contains("is not a library"), "{reason}");
    }

    #[test]
    fn libraries_of_nvidias_packages_are_loaded_and_the_linkers_go_first() {
        let packages = tempfile::tempdir().unwrap();
        let capi = packages.path().join("onnxruntime/capi");
        let place = |folder| CudaPlace::new(folder, false);
        let name = "libcublas-of-a-test.so.13";
        let missing = place(&capi).load(name).unwrap_err();
        assert!(missing.contains("No such file"), "{missing}");
        // Packages since CUDA 13 share a directory, and older ones do not.
        for (package, name) in [("cu13", name), ("curand", "libcurand-of-a-test.so.10")] {
            let lib = packages.path().join("nvidia").join(package).join("lib");
            std::fs::create_dir_all(&lib).unwrap();
            std::fs::copy(find_library(None), lib.join(name)).unwrap();
            assert_eq!(place(&capi).load(name), Ok(()));
        }
        // A library that is not in a Python environment has no packages.
        assert!(place(packages.path()).packages.is_empty());
        // The C library of the dynamic linker, not this broken one.
        let broken = packages.path().join("nvidia/cu13/lib/libc.so.6");
        std::fs::write(broken, "broken").unwrap();
        assert_eq!(place(&capi).load("libc.so.6"), Ok(()));
    }
    /// Compiles an empty library that is linked with others.
    fn compile(file: &Path, more: &[&std::ffi::OsStr]) {
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        let mut soname = std::ffi::OsString::from("-Wl,-soname,");
        soname.push(file.file_name().unwrap());
        let status = std::process::Command::new("cc")
            .args(["-shared", "-fPIC", "-x", "c", "/dev/null", "-o"])
            .arg(file)
            .arg(soname)
            .args(["-x", "none", "-Wl,--no-as-needed"])
            .args(more)
            .status();
        assert!(status.unwrap().success());
    }

    #[test]
    fn a_provider_finds_what_was_loaded_before_it() {
        let packages = tempfile::tempdir().unwrap();
        let capi = packages.path().join("onnxruntime/capi");
        let provider = capi.join(PROVIDER_FILES[1]);
        let needed = "libcu-before-the-provider.so.13";
        let file = packages.path().join("nvidia/cu13/lib").join(needed);
        compile(&file, &[]);
        compile(&provider, &[file.as_os_str()]);
        let library = capi.join("libonnxruntime.so.1.31.1");
        let reason = load(&provider).unwrap_err();
        assert!(reason.contains(needed), "{reason}");
        preload(&library);
        assert_eq!(load(&provider), Ok(()));
    }
}
