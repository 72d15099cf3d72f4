//! Scratch files: numbers that do not fit into memory, written once and then read
//! through a mapping.

use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::Path;

use memmap2::Mmap;

/// File without a name, of this process alone, that is being written. Its room on
/// the disk is free again when the process ends, in whatever way.
#[derive(Debug)]
pub(crate) struct ScratchFile(BufWriter<File>);

impl ScratchFile {
    /// Creates a file on the disk of `folder`.
    ///
    /// # Errors
    ///
    /// When the file cannot be created.
    pub(crate) fn create(folder: &Path) -> std::io::Result<Self> {
        use std::sync::atomic::{AtomicU64, Ordering};

        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = folder.join(format!(".scratch.{}.{number}.tmp", std::process::id()));
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)?;
        std::fs::remove_file(&path)?;
        Ok(Self(BufWriter::new(file)))
    }

    /// Appends bytes.
    ///
    /// # Errors
    ///
    /// When the disk is full or fails.
    pub(crate) fn append(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.0.write_all(bytes)
    }

    /// Ends the writing, and maps the file into memory.
    ///
    /// # Errors
    ///
    /// When the last bytes cannot be written, or the file cannot be mapped.
    pub(crate) fn map(self) -> std::io::Result<Mmap> {
        let file = self
            .0
            .into_inner()
            .map_err(std::io::IntoInnerError::into_error)?;
        // SAFETY: The file has no name and its only handle ends here, so nobody
        // can change or shorten it while it is mapped.
        #[expect(unsafe_code, reason = "no safe interface maps a file")]
        let map = unsafe { Mmap::map(&file) }?;
        Ok(map)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_read_as_they_were_written_and_no_file_is_left() {
        let folder = tempfile::tempdir().unwrap();
        let mut file = ScratchFile::create(folder.path()).unwrap();
        let other = ScratchFile::create(folder.path()).unwrap();
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        let bytes: Vec<u8> = (0..=255).cycle().take(100_000).collect();
        for piece in bytes.chunks(999) {
            file.append(piece).unwrap();
        }
        assert_eq!(file.map().unwrap()[..], bytes);
        assert!(other.map().unwrap().is_empty());
    }
}
