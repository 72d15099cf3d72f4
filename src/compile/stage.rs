//! The folder that an output is made in before it takes its place.
//!
//! It lies beside the output, so that moving it is one rename. If a
//! compilation fails it is removed; if it is killed, the next one in the same
//! folder removes it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use super::error::CompileError;
use crate::files::hex;
use crate::model::{architecture, files};

/// Directory that a compiled model is made in.
pub(super) struct StagingFolder {
    folder: PathBuf,
    output: PathBuf,
    is_committed: bool,
    /// Held for as long as somebody works here; the system lets go of it when
    /// the process ends, however it ends.
    _lock: File,
}

impl StagingFolder {
    /// Begins to make `output`, which must not be there or be empty.
    pub(super) fn new(output: &Path) -> Result<Self, CompileError> {
        let refuse = |reason: &str| CompileError::Write {
            path: output.to_owned(),
            reason: reason.to_owned(),
        };
        if fs::exists(output).map_err(|error| CompileError::write(output, &error))? {
            let is_empty = fs::read_dir(output).is_ok_and(|mut entries| entries.next().is_none());
            if !is_empty {
                return Err(refuse("it exists and is not an empty folder"));
            }
        }
        let name = output
            .file_name()
            .ok_or_else(|| refuse("its path does not end in a name"))?
            .to_string_lossy();
        let parent = parent(output);
        fs::create_dir_all(parent).map_err(|error| CompileError::write(parent, &error))?;
        remove_abandoned(parent);
        let folder = parent.join(format!(".{name}{INFIX}{:016x}", random()));
        let lock_path = lock_path(&folder);
        let written = |error: &std::io::Error| CompileError::write(&lock_path, error);
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

    /// Bytes of each file so far, but for a profile that is being read.
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

    /// The SHA-256 of each of these files.
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
        // There is nobody left to tell.
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

/// What marks the name of a stage.
const INFIX: &str = ".partial-";

/// Not a process's id: in containers that share a volume, all have the same.
pub(super) fn random() -> u64 {
    use std::hash::{BuildHasher as _, RandomState};
    RandomState::new().hash_one(std::process::id())
}

/// Beside the folder, since the folder becomes the output.
fn lock_path(folder: &Path) -> PathBuf {
    let mut name = folder.as_os_str().to_owned();
    name.push(".lock");
    name.into()
}

/// Removes what compilations that are no more left behind: stages whose lock
/// nobody holds.
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
        // A lock is made before its folder and removed after it, so a folder
        // without one is nobody's.
        let is_held = File::open(&lock).is_ok_and(|lock| lock.try_lock().is_err());
        if !is_held {
            let _ = fs::remove_dir_all(&path);
            let _ = fs::remove_file(&lock);
        }
    }
}
