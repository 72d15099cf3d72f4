//! The files that graphs are served from, and that they are still those which
//! the model's digest is over.
//!
//! A file that is mapped ends the process when somebody cuts it, and gives other
//! numbers when somebody writes into it. So graphs and their weights are read into
//! memory, hashed on the way, and served from there: what happens to the files
//! afterwards is of no concern to those who are served.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use sha2::{Digest, Sha256};

use crate::files::hex;

/// Bytes read at once.
const CHUNK: usize = 1 << 20;

/// A file's SHA-256.
pub(crate) type Sha256Digest = [u8; 32];

/// Facts about a file since the model was opened.
#[derive(Debug)]
struct Known {
    bytes: u64,
    sha256: Sha256Digest,
    origin: DigestOrigin,
    /// Content of the file, for as long as an engine loads from it: several devices read
    /// it once.
    content: Mutex<Option<Weak<[u8]>>>,
}

/// Who says what a file's digest is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum DigestOrigin {
    /// The manifest of a compiled folder.
    Recorded,
    /// The file itself, when the model was opened.
    Opened,
}

/// Files of a model, as the module says. Clones are of the same files.
#[derive(Debug, Clone, Default)]
pub struct GraphFiles(Arc<BTreeMap<PathBuf, Known>>);

/// Files as they become known.
#[derive(Debug, Default)]
pub(super) struct FilesByPath(BTreeMap<PathBuf, Known>);

impl FilesByPath {
    pub(super) fn add(
        &mut self,
        path: PathBuf,
        bytes: u64,
        sha256: Sha256Digest,
        origin: DigestOrigin,
    ) {
        let known = Known {
            bytes,
            sha256,
            origin,
            content: Mutex::new(None),
        };
        self.0.insert(path, known);
    }

    pub(super) fn bytes(&self, path: &Path) -> Option<u64> {
        self.0.get(path).map(|known| known.bytes)
    }

    pub(super) fn sha256(&self, path: &Path) -> Option<Sha256Digest> {
        self.0.get(path).map(|known| known.sha256)
    }

    pub(super) fn done(self) -> GraphFiles {
        GraphFiles(Arc::new(self.0))
    }
}

impl GraphFiles {
    /// These files as they are now.
    #[cfg(test)]
    pub(crate) fn of(paths: &[PathBuf]) -> Self {
        let mut found = FilesByPath::default();
        for path in paths {
            let (bytes, digest) = sha256(path).expect("a file of a test");
            found.add(path.clone(), bytes, digest, DigestOrigin::Opened);
        }
        found.done()
    }

    /// A file's content, if it is still what it was.
    ///
    /// # Errors
    ///
    /// When it is not, or cannot be read.
    pub(crate) fn read(&self, path: &Path) -> Result<Arc<[u8]>, String> {
        let known = self.known(path)?;
        // Whoever else wants it waits, and has it then.
        let mut held = known.content.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(content) = held.as_ref().and_then(Weak::upgrade) {
            return Ok(content);
        }
        let mut reader = self.reader(path)?;
        let mut content = zeros(known.bytes)?;
        if let Some(content) = Arc::get_mut(&mut content) {
            reader.fill(content)?;
        }
        reader.finish()?;
        *held = Some(Arc::downgrade(&content));
        Ok(content)
    }

    /// A reader of a file, which says at the end whether it was what it should
    /// be.
    pub(crate) fn reader(&self, path: &Path) -> Result<FileReader<'_>, String> {
        let known = self.known(path)?;
        let (file, bytes) = open(path).map_err(|error| error.to_string())?;
        if bytes != known.bytes {
            return Err(format!(
                "has {bytes} bytes where {} has {}; {}",
                known.origin.name(),
                known.bytes,
                known.origin.remedy()
            ));
        }
        Ok(FileReader {
            file,
            known,
            hash: Sha256::new(),
            position: 0,
        })
    }

    fn known(&self, path: &Path) -> Result<&Known, String> {
        let known = self.0.get(path);
        known.ok_or_else(|| "is no file that the model's digest is over".to_owned())
    }
}

impl DigestOrigin {
    fn name(self) -> &'static str {
        match self {
            Self::Recorded => "imagegpt.json",
            Self::Opened => "the model's digest",
        }
    }

    fn remedy(self) -> &'static str {
        match self {
            Self::Recorded => "restore the file, or compile the model again",
            Self::Opened => "it was changed while the model was loaded; start again",
        }
    }
}

/// Reads a file from its beginning to its end.
pub(crate) struct FileReader<'a> {
    file: File,
    known: &'a Known,
    hash: Sha256,
    position: u64,
}

impl FileReader<'_> {
    pub(crate) fn bytes(&self) -> u64 {
        self.known.bytes
    }

    /// Reads as much as `place` holds.
    pub(crate) fn fill(&mut self, place: &mut [u8]) -> Result<(), String> {
        // In pieces, so that what is hashed is still in the processor's cache.
        for piece in place.chunks_mut(CHUNK) {
            self.file
                .read_exact(piece)
                .map_err(|error| self.failed(&error))?;
            self.hash.update(&*piece);
            self.position += piece.len() as u64;
        }
        Ok(())
    }

    /// Reads on to a place, for the digest alone.
    pub(crate) fn pass(&mut self, to: u64) -> Result<(), String> {
        let mut scratch = Vec::new();
        while self.position < to {
            let n_bytes = (to - self.position).min(CHUNK as u64);
            scratch.resize(usize::try_from(n_bytes).unwrap_or(CHUNK), 0);
            self.fill(&mut scratch)?;
        }
        Ok(())
    }

    /// Reads what is left, and compares.
    pub(crate) fn finish(mut self) -> Result<(), String> {
        self.pass(self.known.bytes)?;
        let found = Sha256Digest::from(self.hash.finalize());
        if found == self.known.sha256 {
            return Ok(());
        }
        Err(differs(found, self.known.sha256, self.known.origin))
    }

    fn failed(&self, error: &io::Error) -> String {
        if error.kind() == io::ErrorKind::UnexpectedEof {
            return format!(
                "was cut to less than its {} bytes while it was read; {}",
                self.known.bytes,
                self.known.origin.remedy()
            );
        }
        error.to_string()
    }
}

/// Error for a file whose digest is another.
pub(super) fn differs(found: Sha256Digest, wanted: Sha256Digest, origin: DigestOrigin) -> String {
    format!(
        "has the SHA-256 {} where {} has {}; {}",
        hex(&found),
        origin.name(),
        hex(&wanted),
        origin.remedy()
    )
}

/// Memory of a size, or a sentence: an allocation that fails would end the process.
fn zeros(bytes: u64) -> Result<Arc<[u8]>, String> {
    let length = usize::try_from(bytes).unwrap_or(usize::MAX);
    // Given back at once; it is there for whoever asks next.
    let is_there = Vec::<u8>::new().try_reserve_exact(length).is_ok();
    if !is_there {
        return Err(format!(
            "takes {bytes} bytes of memory, which are not there"
        ));
    }
    Ok(std::iter::repeat_n(0, length).collect())
}

/// A regular file and its size. Others are refused: a pipe would be waited for, and
/// a device may have no end.
pub(crate) fn open(path: &Path) -> io::Result<(File, u64)> {
    let regular = |metadata: &std::fs::Metadata| {
        if metadata.is_file() {
            Ok(metadata.len())
        } else {
            Err(io::Error::other("is no regular file"))
        }
    };
    regular(&std::fs::metadata(path)?)?;
    let file = File::open(path)?;
    let bytes = regular(&file.metadata()?)?;
    Ok((file, bytes))
}

/// Size and digest of a file.
pub(crate) fn sha256(path: &Path) -> io::Result<(u64, Sha256Digest)> {
    let (mut file, _) = open(path)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; CHUNK];
    let mut bytes = 0;
    loop {
        let n_bytes = file.read(&mut buffer)?;
        if n_bytes == 0 {
            return Ok((bytes, hash.finalize().into()));
        }
        hash.update(&buffer[..n_bytes]);
        bytes += n_bytes as u64;
    }
}

/// The file that a graph names, which must be beside the graph or below.
///
/// Links are followed: what a hub's cache has in a snapshot are links to where its
/// files are, and so have volumes of Kubernetes. Whoever makes a link chose where
/// it leads; a graph's name is its publisher's.
pub(crate) fn beside(graph: &Path, location: &str) -> Result<PathBuf, String> {
    let is_inside = |part: Component<'_>| matches!(part, Component::Normal(_) | Component::CurDir);
    let relative = Path::new(location);
    if location.is_empty() || location.contains('\0') || !relative.components().all(is_inside) {
        return Err(format!(
            "names the file {location:?}, which is not in the graph's folder; move the file there \
             and save the graph again with its name alone"
        ));
    }
    Ok(graph.with_file_name("").join(relative))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(path: &Path) -> GraphFiles {
        let (bytes, digest) = sha256(path).unwrap();
        let mut found = FilesByPath::default();
        found.add(path.to_owned(), bytes, digest, DigestOrigin::Recorded);
        found.done()
    }

    #[test]
    fn content_is_what_was_there_when_the_model_was_opened() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("weights.bin");
        let content: Vec<u8> = (0..3_000_000_u32).map(|n| n.to_le_bytes()[1]).collect();
        std::fs::write(&path, &content).unwrap();
        let files = files(&path);
        let read = files.read(&path).unwrap();
        assert_eq!(*read, *content);
        // What was read does not change with the file, and is not read again.
        std::fs::write(&path, b"other").unwrap();
        assert_eq!(*files.read(&path).unwrap(), *content);
        drop(read);
        let refused = |word: &str| {
            let error = files.read(&path).unwrap_err();
            assert!(error.contains(word), "{error}");
        };
        refused("has 5 bytes where imagegpt.json has 3000000; restore the file");
        let mut other = content.clone();
        other[2_999_999] ^= 1;
        std::fs::write(&path, &other).unwrap();
        refused("has the SHA-256 ");
        std::fs::remove_file(&path).unwrap();
        refused("No such file");
        std::fs::create_dir(&path).unwrap();
        refused("no regular file");
        assert!(files.read(dir.path()).unwrap_err().contains("digest"));
    }

    #[test]
    fn a_file_that_is_cut_while_it_is_read_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("weights.bin");
        std::fs::write(&path, vec![7; 4 * CHUNK]).unwrap();
        let files = files(&path);
        let mut reader = files.reader(&path).unwrap();
        reader.fill(&mut [0; 10]).unwrap();
        let file = File::options().write(true).open(&path).unwrap();
        file.set_len(100).unwrap();
        let error = reader.finish().unwrap_err();
        assert!(
            error.contains("was cut to less than its 4194304"),
            "{error}"
        );
    }

    #[test]
    fn names_stay_in_the_graphs_folder() {
        let beside = |name: &str| beside(Path::new("m/onnx/model.onnx"), name);
        assert_eq!(beside("w.bin").unwrap(), Path::new("m/onnx/w.bin"));
        assert_eq!(beside("./d/w").unwrap(), Path::new("m/onnx/d/w"));
        for name in ["", "../w.bin", "/etc/passwd", "d/../../w", "..", "a\0b"] {
            let error = beside(name).unwrap_err();
            assert!(error.contains("not in the graph's folder"), "{error}");
        }
    }

    #[test]
    fn sizes_that_no_memory_has_are_refused() {
        assert!(zeros(u64::MAX).unwrap_err().contains("bytes of memory"));
    }
}
