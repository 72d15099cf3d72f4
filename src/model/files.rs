//! The files that graphs are loaded from, with a check that they are still the
//! files that the model's digest covers.
//!
//! A memory-mapped file ends the process when somebody truncates it, and gives
//! other numbers when somebody writes into it. So graphs and their weights are
//! read into memory, hashed on the way, and served from there: later changes of
//! the files do not affect running workers.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use sha2::{Digest, Sha256};

use crate::files::hex;

/// Number of bytes per read.
const CHUNK: usize = 1 << 20;

/// SHA-256 of a file.
pub(crate) type Sha256Digest = [u8; 32];

/// Facts about a file, recorded when the model was opened.
#[derive(Debug)]
struct Known {
    bytes: u64,
    sha256: Sha256Digest,
    origin: DigestOrigin,
    /// Content of the file while an engine loads from it, so that several
    /// devices share one read.
    content: Mutex<Option<Weak<[u8]>>>,
}

/// Origin of a file's expected digest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum DigestOrigin {
    /// The manifest of a compiled directory.
    Recorded,
    /// The file itself, when the model was opened.
    Opened,
}

/// Files of a model, read and checked as the module describes. Clones share
/// them.
#[derive(Debug, Clone, Default)]
pub struct GraphFiles(Arc<BTreeMap<PathBuf, Known>>);

/// Files of a model while they are collected.
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
    /// Takes the files at `paths` with their present digests.
    #[cfg(test)]
    pub(crate) fn of(paths: &[PathBuf]) -> Self {
        let mut found = FilesByPath::default();
        for path in paths {
            let (bytes, digest) = sha256(path).expect("a file of a test");
            found.add(path.clone(), bytes, digest, DigestOrigin::Opened);
        }
        found.done()
    }

    /// Returns a file's content, if it has not changed since the model was
    /// opened.
    ///
    /// # Errors
    ///
    /// When the file has changed or cannot be read.
    pub(crate) fn read(&self, path: &Path) -> Result<Arc<[u8]>, String> {
        let known = self.known(path)?;
        // Other callers wait for the lock and then share this content.
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

    /// Opens a file for reading; `FileReader::finish` then compares its digest.
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
        known.ok_or_else(|| "is not a file that the model's digest covers".to_owned())
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
            Self::Opened => "the file changed while the model was loaded; start the worker again",
        }
    }
}

/// Reader of a file from its beginning to its end, which hashes what it reads.
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

    /// Reads the next bytes, as many as `place` holds.
    pub(crate) fn fill(&mut self, place: &mut [u8]) -> Result<(), String> {
        // In pieces, so that bytes are still in the processor's cache when they
        // are hashed.
        for piece in place.chunks_mut(CHUNK) {
            self.file
                .read_exact(piece)
                .map_err(|error| self.failed(&error))?;
            self.hash.update(&*piece);
            self.position += piece.len() as u64;
        }
        Ok(())
    }

    /// Reads up to the offset `to`, for the digest only.
    pub(crate) fn pass(&mut self, to: u64) -> Result<(), String> {
        let mut scratch = Vec::new();
        while self.position < to {
            let n_bytes = (to - self.position).min(CHUNK as u64);
            scratch.resize(usize::try_from(n_bytes).unwrap_or(CHUNK), 0);
            self.fill(&mut scratch)?;
        }
        Ok(())
    }

    /// Reads the rest of the file and compares the digest.
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
                "was truncated to less than its {} bytes while it was read; {}",
                self.known.bytes,
                self.known.origin.remedy()
            );
        }
        error.to_string()
    }
}

/// Error text for a file whose digest differs from the expected digest.
pub(super) fn differs(found: Sha256Digest, wanted: Sha256Digest, origin: DigestOrigin) -> String {
    format!(
        "has the SHA-256 {} where {} has {}; {}",
        hex(&found),
        origin.name(),
        hex(&wanted),
        origin.remedy()
    )
}

/// Allocates `bytes` zeros, or returns an error text; an allocation that fails
/// would end the process.
fn zeros(bytes: u64) -> Result<Arc<[u8]>, String> {
    let length = usize::try_from(bytes).unwrap_or(usize::MAX);
    // The trial allocation is freed at once, so that the next one can have it.
    let is_there = Vec::<u8>::new().try_reserve_exact(length).is_ok();
    if !is_there {
        return Err(format!(
            "needs {bytes} bytes of memory, more than can be allocated"
        ));
    }
    Ok(std::iter::repeat_n(0, length).collect())
}

/// Opens a regular file and returns its size in bytes. Other files are refused:
/// a pipe might block forever, and a device may be endless.
pub(crate) fn open(path: &Path) -> io::Result<(File, u64)> {
    let regular = |metadata: &std::fs::Metadata| {
        if metadata.is_file() {
            Ok(metadata.len())
        } else {
            Err(io::Error::other("is not a regular file"))
        }
    };
    regular(&std::fs::metadata(path)?)?;
    let file = File::open(path)?;
    let bytes = regular(&file.metadata()?)?;
    Ok((file, bytes))
}

/// Returns the size and the digest of a file.
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

/// Returns the path of a file that a graph names, which must be in the graph's
/// directory or below.
///
/// Symbolic links are followed: the snapshots of a hub's cache consist of
/// links, and so do volumes of Kubernetes. A link was made by the operator of
/// this machine, who chose its target; a name in a graph was chosen by its
/// publisher.
pub(crate) fn beside(graph: &Path, location: &str) -> Result<PathBuf, String> {
    let is_inside = |part: Component<'_>| matches!(part, Component::Normal(_) | Component::CurDir);
    let relative = Path::new(location);
    if location.is_empty() || location.contains('\0') || !relative.components().all(is_inside) {
        return Err(format!(
            "names the file {location:?}, which is not in the graph's directory; move \
             the file there and save the graph again with the file's name alone"
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
        refused("not a regular file");
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
            error.contains("was truncated to less than its 4194304"),
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
            assert!(error.contains("not in the graph's directory"), "{error}");
        }
    }

    #[test]
    fn sizes_that_no_memory_has_are_refused() {
        assert!(zeros(u64::MAX).unwrap_err().contains("bytes of memory"));
    }
}
