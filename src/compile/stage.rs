//! The folder that an output is made in before it takes its place.
//!
//! It lies beside the output, so that moving it is one rename. If a
//! compilation fails it is removed; if it is killed, the next one for the same
//! output removes it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use super::error::CompileError;

/// See the module.
pub(super) struct Stage {
    folder: PathBuf,
    output: PathBuf,
    is_committed: bool,
}

impl Stage {
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
        let prefix = format!(".{name}.partial-");
        let idx = COUNT.fetch_add(1, Ordering::Relaxed);
        remove_abandoned(parent, &prefix, idx == 0);
        let folder = parent.join(format!("{prefix}{}-{idx}", std::process::id()));
        fs::create_dir(&folder).map_err(|error| CompileError::write(&folder, &error))?;
        Ok(Self {
            folder,
            output: output.to_owned(),
            is_committed: false,
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
        let bytes = fs::read(file).map_err(|error| CompileError::read(file, &error))?;
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        self.write(&name, &bytes)?;
        Ok(())
    }

    /// Bytes of each file so far.
    pub(super) fn files(&self) -> Result<BTreeMap<String, u64>, CompileError> {
        let read = |error| CompileError::read(&self.folder, &error);
        let mut files = BTreeMap::new();
        for entry in fs::read_dir(&self.folder).map_err(read)? {
            let entry = entry.map_err(read)?;
            let name = entry.file_name().to_string_lossy().into_owned();
            files.insert(name, entry.metadata().map_err(read)?.len());
        }
        Ok(files)
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

impl Drop for Stage {
    fn drop(&mut self) {
        if !self.is_committed {
            // There is nobody left to tell.
            let _ = fs::remove_dir_all(&self.folder);
        }
    }
}

fn parent(output: &Path) -> &Path {
    match output.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Stages that this process began.
static COUNT: AtomicU64 = AtomicU64::new(0);

/// Removes what compilations that are no more left behind. In a container a
/// process often has the id of the one before it: if this is its first stage,
/// whatever bears its id is not its own.
fn remove_abandoned(parent: &Path, prefix: &str, is_first: bool) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let pid = name.to_str().and_then(|name| name.strip_prefix(prefix));
        let Some((pid, _)) = pid.and_then(|pid| pid.split_once('-')) else {
            continue;
        };
        let is_dead = match pid.parse::<u32>() {
            Ok(pid) if pid == std::process::id() => is_first,
            Ok(pid) => !Path::new("/proc").join(pid.to_string()).exists(),
            Err(_) => false,
        };
        if is_dead {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}
