//! Standard output, whose reader may go away (broken pipe) and whose disk may
//! be full.

use std::io::{self, ErrorKind, Write};

/// Behavior of a command once nobody reads its output (broken pipe).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unread {
    /// The command ends with the error, since printing is its only purpose.
    Ends,
    /// The command continues, since its work and its exit code matter by
    /// themselves.
    GoesOn,
}

/// Standard output of a command. Its errors say that standard output cannot be
/// written.
#[derive(Debug)]
pub struct Printer<W> {
    out: W,
    unread: Unread,
    is_unread: bool,
    has_failed: bool,
}

impl Printer<io::Stdout> {
    #[must_use]
    pub fn stdout(unread: Unread) -> Self {
        Self::new(io::stdout(), unread)
    }
}

impl<W: Write> Printer<W> {
    fn new(out: W, unread: Unread) -> Self {
        Self {
            out,
            unread,
            is_unread: false,
            has_failed: false,
        }
    }

    /// True if writing failed, other than by a broken pipe after which the
    /// command continues.
    pub fn has_failed(&self) -> bool {
        self.has_failed
    }

    /// Returns the error with its explanation, or `done` if the command
    /// continues.
    fn settle<T>(&mut self, written: io::Result<T>, done: T) -> io::Result<T> {
        let error = match written {
            Err(error) if error.kind() == ErrorKind::Interrupted => return Err(error),
            Err(error) => error,
            Ok(written) => return Ok(written),
        };
        if error.kind() == ErrorKind::BrokenPipe && self.unread == Unread::GoesOn {
            self.is_unread = true;
            return Ok(done);
        }
        self.has_failed = true;
        let text = format!("standard output cannot be written: {error}");
        Err(io::Error::new(error.kind(), text))
    }
}

impl<W: Write> Write for Printer<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.is_unread {
            return Ok(bytes.len());
        }
        let written = self.out.write(bytes);
        self.settle(written, bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.is_unread {
            return Ok(());
        }
        let flushed = self.out.flush();
        self.settle(flushed, ())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Broken(ErrorKind);

    impl Write for Broken {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(self.0.into())
        }

        fn flush(&mut self) -> io::Result<()> {
            Err(self.0.into())
        }
    }

    #[test]
    fn only_a_reader_that_left_is_passed_over_and_only_where_it_may_be() {
        let kind = |kind, unread| {
            let mut printer = Printer::new(Broken(kind), unread);
            let written = writeln!(printer, "text").and_then(|()| printer.flush());
            written.map_err(|error| {
                let text = error.to_string();
                assert!(
                    text.starts_with("standard output cannot be written: "),
                    "{text}"
                );
                error.kind()
            })
        };
        let (gone, full) = (ErrorKind::BrokenPipe, ErrorKind::StorageFull);
        assert_eq!(kind(gone, Unread::GoesOn), Ok(()));
        assert_eq!(kind(gone, Unread::Ends), Err(gone));
        assert_eq!(kind(full, Unread::GoesOn), Err(full));
        assert_eq!(kind(full, Unread::Ends), Err(full));
    }
}
