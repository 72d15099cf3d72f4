//! Directory for compiled models: whether it can be created, and its free
//! space.

use std::path::{Path, PathBuf};
use std::{fs, io};

use crate::compile::cache;

/// Findings about the directory for compiled models.
#[derive(Debug, Clone)]
pub(super) struct CacheFinding {
    /// Path of the directory, or the reason why there is none.
    pub(super) folder: Result<PathBuf, String>,
    /// Free space in bytes, or the reason why nothing can be written there.
    pub(super) space: Result<u64, String>,
}

impl CacheFinding {
    /// Finds the directory that `serve` would use; the directory need not exist
    /// yet.
    pub(super) fn find(given: Option<&Path>) -> Self {
        let folder = cache::folder(given).map_err(|error| error.to_string());
        let space = folder.as_deref().map_err(Clone::clone).and_then(space);
        Self { folder, space }
    }
}

/// Returns the free space where `folder` is or will be.
fn space(folder: &Path) -> Result<u64, String> {
    let there = nearest(folder).map_err(|error| error.to_string())?;
    let of = |error: io::Error| format!("{}: {error}", there.display());
    // A broken link is an error here, as it would be when the directory is
    // created in its place.
    if !fs::metadata(&there).map_err(of)?.is_dir() {
        return Err(format!("{} is not a directory", there.display()));
    }
    // Permissions do not tell everything: some file systems allow no new
    // directories.
    let probe = there.join(format!(".imagegpt-doctor.{}", std::process::id()));
    fs::create_dir(&probe).map_err(of)?;
    fs::remove_dir(&probe).map_err(of)?;
    let volume = rustix::fs::statvfs(&there).map_err(|error| of(error.into()))?;
    Ok(volume.f_bavail * volume.f_frsize)
}

/// Returns the longest beginning of the path that exists, of whatever type.
fn nearest(folder: &Path) -> io::Result<PathBuf> {
    let absolute = std::path::absolute(folder)?;
    let mut ancestors = absolute.ancestors();
    let there = ancestors.find(|path| path.symlink_metadata().is_ok());
    Ok(there.unwrap_or(&absolute).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn space_is_that_of_the_nearest_folder_that_is_there() {
        let folder = tempfile::tempdir().unwrap();
        let free = space(&folder.path().join("not/there/yet")).unwrap();
        assert!(free > 0);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "none stay");
    }

    #[test]
    fn where_no_folder_can_be_made_the_reason_is_said() {
        let parent = tempfile::tempdir().unwrap();
        let (file, link) = (parent.path().join("file"), parent.path().join("link"));
        fs::write(&file, "").unwrap();
        std::os::unix::fs::symlink("/nowhere/at/all", &link).unwrap();
        let check = |path: &Path, expected: &str| {
            let reason = space(path).unwrap_err();
            assert!(reason.contains(expected), "{}: {reason}", path.display());
        };
        check(&file, "file is not a directory");
        check(&file.join("below"), "file is not a directory");
        check(&link, "No such file or directory");
        // /proc is a directory in which no directory can be created.
        check(Path::new("/proc/nope"), "/proc: ");
    }
}
