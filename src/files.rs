//! Files that a user names: finding files in a directory, reading them, and
//! showing their names.
//!
//! A directory may hold broken or circular links, pipes that would block a
//! reader for ever, and names that are not text. Each of these is a [`Trouble`]
//! of its own file only; all other files are read.

pub(crate) mod scratch;

use std::borrow::Cow;
use std::fs::Metadata;
use std::io::{self, ErrorKind, Read as _, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;

/// Formats bytes as lower-case hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Checks that a file can be written, before there is anything to write.
/// Changes nothing. A path that is not a regular file, such as a pipe, is only
/// tested by the writing itself.
///
/// # Errors
///
/// The reason why the file cannot be written.
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

/// Largest size of a file that a flag names; a certificate chain takes a few
/// KiB.
const FLAG_FILE_BYTES_MAX: u64 = 1 << 20;

/// A file together with the flag that named it, for error messages.
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
            // Opening a pipe would block.
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

/// Largest depth of nested directories; deeper ones are not searched.
const DEPTH_MAX: usize = 64;

/// File extensions of images, in lower case.
pub(crate) const IMAGES: [&str; 13] = [
    "png", "jpg", "jpeg", "webp", "gif", "bmp", "dib", "tif", "tiff", "jpe", "jfif", "pjpeg", "pjp",
];

/// File extensions of pictures whose formats are not read, in lower case. Files
/// of these kinds are counted or named, never passed over in silence.
pub(crate) const UNREAD_IMAGES: [&str; 32] = [
    "heic", "heif", "heics", "heifs", "hif", "avif", "avifs", "jxl", "jp2", "j2k", "jpx", "jpf",
    "jxr", "wdp", "svg", "ico", "psd", "tga", "ppm", "pgm", "pbm", "pnm", "exr", "hdr", "qoi",
    "dng", "cr2", "cr3", "nef", "arw", "raf", "orf",
];

/// Converts a file name to text. A name that is not UTF-8 is escaped so that
/// different names stay different: each byte that is not UTF-8, and each `%`,
/// becomes `%` and two hexadecimal digits.
pub(crate) fn name_as_text(name: &[u8]) -> Cow<'_, str> {
    use std::fmt::Write;
    if let Ok(text) = std::str::from_utf8(name) {
        return text.into();
    }
    let mut text = String::with_capacity(name.len() + 16);
    for chunk in name.utf8_chunks() {
        text.push_str(&chunk.valid().replace('%', "%25"));
        for byte in chunk.invalid() {
            // Writing to a string cannot fail.
            let _ = write!(text, "%{byte:02X}");
        }
    }
    text.into()
}

/// Reason why a path is not read as a file.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Trouble {
    #[error("there is no such file")]
    Missing,
    #[error("it is a symbolic link whose target does not exist")]
    LinkNowhere,
    #[error("it is a symbolic link that cannot be followed: {0}")]
    LinkBroken(io::Error),
    #[error("it is a symbolic link to a directory that contains it")]
    LinkCircle,
    #[error("it may not be read (permission denied)")]
    Denied,
    #[error("it is a directory that may not be read (permission denied)")]
    FolderDenied,
    #[error("it is a directory")]
    Folder,
    #[error("it is neither a file nor a directory")]
    Special,
    #[error("it is nested more than {DEPTH_MAX} directories deep, which is not searched")]
    Deep,
    #[error("no file can have this name: {0}")]
    Name(io::Error),
}

impl Trouble {
    /// Returns the trouble for an error that would occur again, and the error
    /// itself for others, such as a failing disk.
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

/// An entry found in a directory or below it.
#[derive(Debug)]
pub(crate) struct FoundFile {
    pub(crate) path: PathBuf,
    /// Metadata of the file; of a link, metadata of its target.
    pub(crate) file: Result<Metadata, Trouble>,
}

impl FoundFile {
    /// True if the file name is that of an image, or the entry may be a
    /// directory of images.
    pub(crate) fn may_be_image(&self) -> bool {
        self.may_be_folder() || {
            let extension = self.path.extension().unwrap_or_default();
            IMAGES.contains(&extension.to_string_lossy().to_lowercase().as_str())
        }
    }

    /// True if the entry cannot be read and is a directory, or may be one by
    /// its name.
    pub(crate) fn may_be_folder(&self) -> bool {
        match &self.file {
            Ok(_) => false,
            Err(Trouble::LinkCircle | Trouble::Deep | Trouble::FolderDenied) => true,
            Err(_) => self.path.extension().is_none(),
        }
    }
}

/// Entries of a directory and of those below it.
#[derive(Debug, Default)]
pub(crate) struct FoundFiles {
    /// Files, sorted by path.
    pub(crate) files: Vec<FoundFile>,
    /// Dotfiles, and directories with a leading dot, which are not searched.
    pub(crate) hidden: Vec<HiddenEntry>,
}

/// Entry whose name begins with a dot.
#[derive(Debug)]
pub(crate) struct HiddenEntry {
    pub(crate) path: PathBuf,
    pub(crate) is_folder: bool,
}

/// Finds all files in a directory and below it. Dotfiles and directories with a
/// leading dot are set apart, as most tools do.
///
/// # Errors
///
/// When the directory itself cannot be read, or the disk fails.
pub(crate) fn below(folder: &Path) -> anyhow::Result<FoundFiles> {
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
    let mut found = walk.found;
    found.files.sort_unstable_by(|a, b| a.path.cmp(&b.path));
    Ok(found)
}

#[derive(Default)]
struct Walk {
    /// Stack of the directories that are being read, outermost first.
    above: Vec<(u64, u64)>,
    found: FoundFiles,
}

fn place(metadata: &Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}

impl Walk {
    fn folder(&mut self, folder: &Path) -> io::Result<()> {
        for entry in std::fs::read_dir(folder)? {
            let entry = entry?;
            if entry.file_name().as_encoded_bytes().starts_with(b".") {
                self.found.hidden.push(HiddenEntry {
                    path: entry.path(),
                    is_folder: entry.file_type().is_ok_and(|kind| kind.is_dir()),
                });
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
            self.found.files.push(FoundFile { path, file });
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

/// Returns the metadata of a path, with links followed.
///
/// # Errors
///
/// An error of the disk; the inner error is the trouble of this path.
pub(crate) fn look(path: &Path) -> io::Result<Result<Metadata, Trouble>> {
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

/// First bytes of a file that some editors write for UTF-8.
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// Returns the text of a file that a person wrote, without the byte order mark
/// with which some editors begin a file.
///
/// # Errors
///
/// When the content is not UTF-8.
pub(crate) fn text(content: &[u8]) -> Result<&str, std::str::Utf8Error> {
    let content = content.strip_prefix(BYTE_ORDER_MARK).unwrap_or(content);
    std::str::from_utf8(content)
}

/// Parses a file of JSON.
///
/// # Errors
///
/// When the content is not JSON, or begins with a byte order mark: Python's
/// reader refuses it as well, so the model's other users could not read it.
pub(crate) fn json<T: serde::de::DeserializeOwned>(content: &[u8]) -> Result<T, String> {
    if content.starts_with(BYTE_ORDER_MARK) {
        return Err(
            "begins with a byte order mark, which JSON does not have; save it as UTF-8 without one"
                .to_owned(),
        );
    }
    serde_json::from_slice(content).map_err(|error| error.to_string())
}

/// Reads a file; `None` if it has more than `max` bytes. Only regular files are
/// read: a pipe would block, and a device may be endless.
///
/// # Errors
///
/// An error of the disk; the inner error is the trouble of this file.
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
    // The file may grow while it is read.
    file.take(max.saturating_add(1)).read_to_end(&mut bytes)?;
    Ok(Ok((bytes.len() as u64 <= max).then_some(bytes)))
}

/// Returns the path of the temporary file that is renamed once it is complete.
pub(crate) fn part(path: &Path) -> PathBuf {
    let mut part = path.as_os_str().to_owned();
    part.push(".part");
    part.into()
}

/// Writes a file through a temporary file that is renamed, so that the file is
/// whole or as it was before, even after a loss of power.
///
/// # Errors
///
/// When the file cannot be written.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let part = part(path);
    let write = || {
        let mut file = std::fs::File::create(&part)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        std::fs::rename(&part, path)
    };
    let written = write();
    if written.is_err() {
        // The temporary file does not exist if it could not be created.
        let _ = std::fs::remove_file(&part);
    }
    written
}

/// Escapes a name for a table: line ends and control characters would break the
/// table or the terminal.
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

    /// Makes a pipe that nobody writes to; every Unix has the program mkfifo.
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
        assert_eq!(found.hidden.len(), 1);
        let found: Vec<String> = found
            .files
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
            found.files[..],
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
    fn names_that_are_not_utf8_stay_different() {
        assert_eq!(name_as_text("Küche 50%.png".as_bytes()), "Küche 50%.png");
        assert_eq!(name_as_text(b"caf\xe9 50%.jpg"), "caf%E9 50%25.jpg");
        assert_eq!(name_as_text(b"\xc3\xa9\xe8\xff"), "é%E8%FF");
    }

    #[test]
    fn names_stay_on_their_line() {
        assert_eq!(printable("Küche 1.png"), "Küche 1.png");
        assert_eq!(printable("a\nb\t\u{1b}[2J.png"), "a\\nb\\t\\u{1b}[2J.png");
    }
}
