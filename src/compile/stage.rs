//! The staging directory, in which an output is made before it is moved into
//! place.
//!
//! The staging directory is beside the output, so that one rename moves it. A
//! compilation that fails removes it; after a compilation that was killed, the
//! next one in the same parent directory removes it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use super::error::CompileError;
use crate::files::hex;
use crate::model::{architecture, files};

/// Directory in which a compiled model is made.
pub(super) struct StagingFolder {
    folder: PathBuf,
    output: PathBuf,
    is_committed: bool,
    /// Lock that marks the directory as in use; the system releases it when the
    /// process ends, however it ends.
    _lock: File,
}

impl StagingFolder {
    /// Creates the staging directory of `output`, which must not exist or be an
    /// empty directory.
    pub(super) fn new(output: &Path) -> Result<Self, CompileError> {
        let refuse = |reason: &str| CompileError::Write {
            path: output.to_owned(),
            reason: reason.to_owned(),
        };
        if fs::exists(output).map_err(|error| CompileError::write(output, &error))? {
            let is_empty = fs::read_dir(output).is_ok_and(|mut entries| entries.next().is_none());
            if !is_empty {
                return Err(refuse("it exists and is not an empty directory"));
            }
        }
        let name = output
            .file_name()
            .ok_or_else(|| refuse("the path does not end in a name"))?
            .to_string_lossy();
        let parent = parent(output);
        fs::create_dir_all(parent).map_err(|error| CompileError::write(parent, &error))?;
        remove_abandoned(parent);
        let folder = parent.join(format!(".{name}{INFIX}{:016x}", random()));
        let lock_path = lock_path(&folder);
        let written = |error: &std::io::Error| CompileError::write(output, error);
        let lock = File::create_new(&lock_path).map_err(|error| written(&error))?;
        lock.lock().map_err(|error| written(&error))?;
        fs::create_dir(&folder).map_err(|error| CompileError::write(&folder, &error))?;
        Ok(Self {
            folder,
            output: output.to_owned(),
            is_committed: false,
            _lock: lock,
        })
    }

    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Writes a whole file and returns its path.
    pub(super) fn write(&self, name: &str, bytes: &[u8]) -> Result<PathBuf, CompileError> {
        let path = self.folder.join(name);
        fs::write(&path, bytes)
            .and_then(|()| File::open(&path)?.sync_all())
            .map_err(|error| CompileError::write(&path, &error))?;
        Ok(path)
    }

    /// Copies a file under its own name.
    pub(super) fn copy(&self, file: &Path) -> Result<(), CompileError> {
        let bytes = architecture::read(file)?;
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        self.write(&name, &bytes)?;
        Ok(())
    }

    /// Returns the size of each file so far, except ONNX Runtime's profiles.
    pub(super) fn files(&self) -> Result<BTreeMap<String, u64>, CompileError> {
        let read = |error| CompileError::read(&self.folder, &error);
        let mut files = BTreeMap::new();
        for entry in fs::read_dir(&self.folder).map_err(read)? {
            let entry = entry.map_err(read)?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.contains(".profile_") {
                continue;
            }
            files.insert(name, entry.metadata().map_err(read)?.len());
        }
        Ok(files)
    }

    /// Returns the SHA-256 of each of the named files.
    pub(super) fn sha256<'a>(
        &self,
        names: impl Iterator<Item = &'a String>,
    ) -> Result<BTreeMap<String, String>, CompileError> {
        let digest = |name: &String| {
            let path = self.folder.join(name);
            let (_, digest) =
                files::sha256(&path).map_err(|error| CompileError::read(&path, &error))?;
            Ok((name.clone(), hex(&digest)))
        };
        names.map(digest).collect()
    }

    /// Moves everything into place.
    pub(super) fn commit(mut self) -> Result<(), CompileError> {
        let sync = |folder: &Path| {
            File::open(folder)
                .and_then(|folder| folder.sync_all())
                .map_err(|error| CompileError::write(folder, &error))
        };
        sync(&self.folder)?;
        fs::rename(&self.folder, &self.output)
            .map_err(|error| CompileError::write(&self.output, &error))?;
        self.is_committed = true;
        sync(parent(&self.output))
    }
}

impl Drop for StagingFolder {
    fn drop(&mut self) {
        // An error cannot be reported here.
        if !self.is_committed {
            let _ = fs::remove_dir_all(&self.folder);
        }
        let _ = fs::remove_file(lock_path(&self.folder));
    }
}

fn parent(output: &Path) -> &Path {
    match output.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Part of a name that marks a staging directory.
const INFIX: &str = ".partial-";

/// Returns a random number for a name. A process id would not do: processes in
/// containers that share a volume have the same id.
pub(super) fn random() -> u64 {
    use std::hash::{BuildHasher as _, RandomState};
    RandomState::new().hash_one(std::process::id())
}

/// Returns the path of a staging directory's lock, which is beside the
/// directory because the directory becomes the output.
fn lock_path(folder: &Path) -> PathBuf {
    let mut name = folder.as_os_str().to_owned();
    name.push(".lock");
    name.into()
}

/// Removes the staging directories of compilations that were killed: those
/// whose lock is not held.
fn remove_abandoned(parent: &Path) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let path = entry.path();
        let name = entry.file_name();
        let is_stage = name
            .to_str()
            .is_some_and(|name| name.starts_with('.') && name.contains(INFIX));
        if !is_stage || !path.is_dir() {
            continue;
        }
        let lock = lock_path(&path);
        // A lock is created before its directory and removed after it, so a
        // directory without a lock belongs to no process.
        let is_held = File::open(&lock).is_ok_and(|lock| lock.try_lock().is_err());
        if !is_held {
            let _ = fs::remove_dir_all(&path);
            let _ = fs::remove_file(&lock);
        }
    }
}
