//! Files that a person names: which there are below a folder, what keeps one
//! from being read, and how its name is shown.
//!
//! Folders hold what nobody expects: links that lead nowhere or in a circle,
//! pipes that would be waited for without end, names that are no text. Each is a
//! [`Trouble`] of that one file, and everybody else's images are read.

use std::borrow::Cow;
use std::fs::Metadata;
use std::io::{self, ErrorKind, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;

/// Lower-case hexadecimal digits of bytes.
pub(crate) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Whether a file can be written, before there is anything to write. Changes
/// nothing; of what is no file, such as a pipe, only the writing itself tells.
///
/// # Errors
///
/// Why it cannot.
pub(crate) fn can_write(path: &Path) -> io::Result<()> {
    match std::fs::metadata(path) {
        Ok(there) if there.is_dir() => Err(ErrorKind::IsADirectory.into()),
        Ok(there) if !there.is_file() => Ok(()),
        Ok(_) => std::fs::OpenOptions::new().write(true).open(path).map(drop),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            std::fs::File::create_new(path)?;
            std::fs::remove_file(path)
        }
        Err(error) => Err(error),
    }
}

/// A chain of certificates takes a few KiB.
const FLAG_FILE_BYTES_MAX: u64 = 1 << 20;

/// A file, with the flag that named it, for sentences about it.
#[derive(Debug, Clone)]
pub(crate) struct FlagFile {
    pub(crate) flag: &'static str,
    pub(crate) path: PathBuf,
}

impl FlagFile {
    pub(crate) fn new(flag: &'static str, path: &Path) -> Self {
        Self {
            flag,
            path: path.to_owned(),
        }
    }

    pub(crate) fn read(&self) -> anyhow::Result<Vec<u8>> {
        let mut content = Vec::new();
        let mut read = || -> std::io::Result<u64> {
            // A pipe would be waited for.
            if !std::fs::metadata(&self.path)?.is_file() {
                return Err(std::io::Error::other("it is not a file"));
            }
            let file = std::fs::File::open(&self.path)?;
            Ok(file
                .take(FLAG_FILE_BYTES_MAX + 1)
                .read_to_end(&mut content)? as u64)
        };
        let n_bytes = read().with_context(|| format!("{self} cannot be read"))?;
        anyhow::ensure!(
            n_bytes <= FLAG_FILE_BYTES_MAX,
            "{self} is over {FLAG_FILE_BYTES_MAX} bytes"
        );
        Ok(content)
    }
}

impl std::fmt::Display for FlagFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.flag, self.path.display())
    }
}

/// Folders within folders; what lies deeper is not looked at.
const DEPTH_MAX: usize = 64;

/// Extensions of images, in lower case.
pub(crate) const IMAGES: [&str; 9] = [
    "png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff", "jpe",
];

/// Why a file, or what should be one, is not read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Trouble {
    #[error("there is no such file")]
    Missing,
    #[error("it is a link that leads nowhere")]
    LinkNowhere,
    #[error("it is a link that cannot be followed: {0}")]
    LinkBroken(io::Error),
    #[error("it is a link back to a folder that it lies in")]
    LinkCircle,
    #[error("it may not be read")]
    Denied,
    #[error("it is a folder that may not be read")]
    FolderDenied,
    #[error("it is a folder")]
    Folder,
    #[error("it is neither a file nor a folder")]
    Special,
    #[error("it lies more than {DEPTH_MAX} folders deep, which is not looked at")]
    Deep,
    #[error("no file can have this name: {0}")]
    Name(io::Error),
}

impl Trouble {
    /// What will be so the next time, too; the disk's own troubles may not.
    fn of(error: io::Error) -> io::Result<Self> {
        match error.kind() {
            ErrorKind::NotFound | ErrorKind::NotADirectory => Ok(Self::Missing),
            ErrorKind::PermissionDenied => Ok(Self::Denied),
            ErrorKind::InvalidInput | ErrorKind::InvalidFilename => Ok(Self::Name(error)),
            _ => Err(error),
        }
    }

    fn of_folder(error: io::Error) -> io::Result<Self> {
        Ok(match Self::of(error)? {
            Self::Denied => Self::FolderDenied,
            trouble => trouble,
        })
    }
}

/// Something below a folder.
#[derive(Debug)]
pub(crate) struct FoundFile {
    pub(crate) path: PathBuf,
    /// Of the file; a link is what it leads to.
    pub(crate) file: Result<Metadata, Trouble>,
}

impl FoundFile {
    /// Whether its name is that of an image, or it may be a folder of them.
    pub(crate) fn may_be_image(&self) -> bool {
        self.may_be_folder() || {
            let extension = self.path.extension().unwrap_or_default();
            IMAGES.contains(&extension.to_string_lossy().to_lowercase().as_str())
        }
    }

    /// Whether it cannot be read and is, or by its name may be, a folder.
    pub(crate) fn may_be_folder(&self) -> bool {
        match &self.file {
            Ok(_) => false,
            Err(Trouble::LinkCircle | Trouble::Deep | Trouble::FolderDenied) => true,
            Err(_) => self.path.extension().is_none(),
        }
    }
}

/// All files below a folder, by name; what begins with a point is not data, as
/// most tools have it.
///
/// # Errors
///
/// When the folder itself cannot be read, or the disk fails.
pub(crate) fn below(folder: &Path) -> anyhow::Result<Vec<FoundFile>> {
    let mut walk = Walk::default();
    let whole = std::fs::metadata(folder).and_then(|metadata| {
        walk.above.push(place(&metadata));
        walk.folder(folder)
    });
    let whole = whole.map_err(|error| match Trouble::of_folder(error) {
        Ok(trouble) => anyhow::Error::new(trouble),
        Err(error) => error.into(),
    });
    whole.with_context(|| format!("{} cannot be read", folder.display()))?;
    walk.found.sort_unstable_by(|a, b| a.path.cmp(&b.path));
    Ok(walk.found)
}

#[derive(Default)]
struct Walk {
    /// The folders that are being read, one in the other.
    above: Vec<(u64, u64)>,
    found: Vec<FoundFile>,
}

fn place(metadata: &Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}

impl Walk {
    fn folder(&mut self, folder: &Path) -> io::Result<()> {
        for entry in std::fs::read_dir(folder)? {
            let entry = entry?;
            if entry.file_name().as_encoded_bytes().starts_with(b".") {
                continue;
            }
            let path = entry.path();
            let file = match look(&path)? {
                Ok(metadata) if metadata.is_dir() => match self.enter(&path, &metadata)? {
                    Ok(()) => continue,
                    Err(trouble) => Err(trouble),
                },
                Ok(metadata) if metadata.is_file() => Ok(metadata),
                Ok(_) => Err(Trouble::Special),
                Err(trouble) => Err(trouble),
            };
            self.found.push(FoundFile { path, file });
        }
        Ok(())
    }

    fn enter(&mut self, folder: &Path, metadata: &Metadata) -> io::Result<Result<(), Trouble>> {
        let place = place(metadata);
        if self.above.contains(&place) {
            return Ok(Err(Trouble::LinkCircle));
        }
        if self.above.len() == DEPTH_MAX {
            return Ok(Err(Trouble::Deep));
        }
        self.above.push(place);
        let read = self.folder(folder);
        self.above.pop();
        match read {
            Ok(()) => Ok(Ok(())),
            Err(error) => Trouble::of_folder(error).map(Err),
        }
    }
}

/// What there is at a path, at the end of its links.
fn look(path: &Path) -> io::Result<Result<Metadata, Trouble>> {
    let error = match std::fs::metadata(path) {
        Ok(metadata) => return Ok(Ok(metadata)),
        Err(error) => error,
    };
    let link = std::fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_symlink());
    Ok(Err(match error.kind() {
        ErrorKind::NotFound if link => Trouble::LinkNowhere,
        _ if link => Trouble::LinkBroken(error),
        _ => Trouble::of(error)?,
    }))
}

/// A file's bytes, or `None` in the place of more than `max`. Only of a regular
/// file: a pipe would be waited for, and a device may have no end.
///
/// # Errors
///
/// The file's trouble within the disk's.
pub(crate) fn read(path: &Path, max: u64) -> io::Result<Result<Option<Vec<u8>>, Trouble>> {
    match look(path)? {
        Ok(metadata) if metadata.is_file() => {}
        Ok(metadata) if metadata.is_dir() => return Ok(Err(Trouble::Folder)),
        Ok(_) => return Ok(Err(Trouble::Special)),
        Err(trouble) => return Ok(Err(trouble)),
    }
    let file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(error) => return Trouble::of(error).map(Err),
    };
    let mut bytes = Vec::new();
    // It may grow while it is read.
    file.take(max.saturating_add(1)).read_to_end(&mut bytes)?;
    Ok(Ok((bytes.len() as u64 <= max).then_some(bytes)))
}

/// A name as it may stand in a table: one that has line ends or control
/// characters would break it, or the terminal.
pub(crate) fn printable(name: &str) -> Cow<'_, str> {
    if !name.chars().any(char::is_control) {
        return name.into();
    }
    let mut shown = String::with_capacity(name.len() + 8);
    for letter in name.chars() {
        if letter.is_control() {
            shown.extend(letter.escape_default());
        } else {
            shown.push(letter);
        }
    }
    shown.into()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// A pipe that nobody writes to; the program is in every Unix.
    fn pipe(path: &Path) {
        let made = std::process::Command::new("mkfifo").arg(path).status();
        assert!(made.unwrap().success());
    }

    #[test]
    fn what_cannot_be_read_is_found_beside_what_can() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::create_dir_all(at("a/b")).unwrap();
        std::fs::write(at("a/1.png"), b"1").unwrap();
        std::fs::write(at("a/.hidden.png"), b"1").unwrap();
        std::fs::write(at("a/notes.txt"), b"1").unwrap();
        symlink("1.png", at("a/good.png")).unwrap();
        symlink("gone.png", at("a/nowhere.png")).unwrap();
        symlink("self.png", at("a/self.png")).unwrap();
        symlink("gone.txt", at("a/nowhere.txt")).unwrap();
        symlink("..", at("a/b/up")).unwrap();
        symlink("gone", at("a/sub")).unwrap();
        pipe(&at("a/pipe.png"));
        let found = below(&at("a")).unwrap();
        let found: Vec<String> = found
            .iter()
            .filter(|found| found.may_be_image())
            .map(|found| {
                let name = found.path.strip_prefix(at("a")).unwrap().display();
                match &found.file {
                    Ok(metadata) => format!("{name} {}", metadata.len()),
                    Err(Trouble::LinkBroken(_)) => format!("{name} LinkBroken"),
                    Err(trouble) => format!("{name} {trouble:?}"),
                }
            })
            .collect();
        assert_eq!(
            found,
            [
                "1.png 1",
                "b/up LinkCircle",
                "good.png 1",
                "nowhere.png LinkNowhere",
                "pipe.png Special",
                "self.png LinkBroken",
                "sub LinkNowhere",
            ]
        );
        assert!(below(&at("none")).is_err());
    }

    #[test]
    fn folders_end_somewhere() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("d/".repeat(DEPTH_MAX + 1));
        std::fs::create_dir_all(&deep).unwrap();
        std::fs::write(deep.join("1.png"), b"1").unwrap();
        let found = below(dir.path()).unwrap();
        assert!(matches!(
            found[..],
            [FoundFile {
                file: Err(Trouble::Deep),
                ..
            }]
        ));
    }

    #[test]
    fn only_files_are_read_and_no_more_than_is_wanted() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::write(at("file"), b"123").unwrap();
        pipe(&at("pipe"));
        let read = |name: &str, max| read(&at(name), max).unwrap();
        assert_eq!(read("file", 3).unwrap().unwrap(), b"123");
        assert!(read("file", 2).unwrap().is_none());
        assert!(matches!(read("none", 3), Err(Trouble::Missing)));
        assert!(matches!(read("", 3), Err(Trouble::Folder)));
        assert!(matches!(read("pipe", 3), Err(Trouble::Special)));
        assert!(matches!(
            super::read(Path::new("/dev/zero"), 3).unwrap(),
            Err(Trouble::Special)
        ));
    }

    #[test]
    fn what_cannot_be_written_is_known_before() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::write(at("old"), b"123").unwrap();
        pipe(&at("pipe"));
        for name in ["new", "old", "pipe"] {
            can_write(&at(name)).unwrap();
        }
        for name in ["no/such/folder", "old/below", ""] {
            assert!(can_write(&at(name)).is_err(), "{name}");
        }
        assert!(!at("new").exists(), "nothing is left");
        assert_eq!(std::fs::read(at("old")).unwrap(), b"123");
    }

    #[test]
    fn names_stay_on_their_line() {
        assert_eq!(printable("Küche 1.png"), "Küche 1.png");
        assert_eq!(printable("a\nb\t\u{1b}[2J.png"), "a\\nb\\t\\u{1b}[2J.png");
    }
}
