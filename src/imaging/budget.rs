//! The budget of decoding one image: when to stop although the file goes on.
//!
//! The header bounds a decode's memory and work before decoding begins. The
//! budget ends a decode early once no caller waits for the image, and limits
//! the CPU time as a last safeguard. Decoders check the budget between chunks,
//! by [`DecodeBudget::check`] or through a source that fails once the budget is
//! spent.

use std::cell::Cell;
use std::io::{self, BufRead, Cursor, Read, Seek, SeekFrom};
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

use super::PreprocessError;

/// Input bytes that a [`BudgetedSource`] hands out between two checks of the
/// budget. The chunk is small enough that even data that inflates a
/// thousandfold is checked every few milliseconds, and large enough that checks
/// cost nothing beside decoding.
const CHUNK_BYTES: usize = 4096;

/// Permission of one decode to go on, until the decode is abandoned or has used
/// up its CPU time.
pub struct DecodeBudget<'a> {
    /// Returns true once no caller waits for the image any longer.
    abandoned: &'a dyn Fn() -> bool,
    /// Limit on the thread's CPU time, and the CPU time at which the decode
    /// began.
    cpu_time_max: Option<(Duration, Duration)>,
    /// Reason of the end. The budget keeps it because a decoder may wrap the
    /// error that ended the decode beyond recognition.
    ended: Cell<Option<BudgetEnd>>,
}

/// Reason why a budget ended a decode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum BudgetEnd {
    Abandoned,
    CpuTime(Duration),
}

impl<'a> DecodeBudget<'a> {
    /// Creates a budget that ends once `abandoned` returns true, or after
    /// `cpu_time_max` of CPU time on the calling thread.
    #[must_use]
    pub fn new(abandoned: &'a dyn Fn() -> bool, cpu_time_max: Duration) -> Self {
        Self {
            abandoned,
            cpu_time_max: Some((cpu_time_max, thread_cpu_time())),
            ended: Cell::new(None),
        }
    }

    /// Creates a budget that ends only once `abandoned` returns true.
    pub(super) fn until(abandoned: &'a dyn Fn() -> bool) -> Self {
        Self {
            abandoned,
            cpu_time_max: None,
            ended: Cell::new(None),
        }
    }

    /// Creates a budget without an end, for images that no caller sent.
    #[must_use]
    pub fn endless() -> DecodeBudget<'static> {
        DecodeBudget::until(&|| false)
    }

    /// Fails once the budget is spent, which ends the decode.
    ///
    /// # Errors
    ///
    /// [`PreprocessError::Abandoned`] or [`PreprocessError::CpuTimeOverLimit`],
    /// and the same error at every later call.
    pub fn check(&self) -> Result<(), PreprocessError> {
        if self.ended.get().is_none() {
            self.ended.set(self.look());
        }
        match self.ended.get() {
            None => Ok(()),
            Some(end) => Err(end.into()),
        }
    }

    /// Returns the budget's error if the budget ended the decode, else `error`.
    pub(super) fn error_or(&self, error: PreprocessError) -> PreprocessError {
        self.ended.get().map_or(error, PreprocessError::from)
    }

    fn look(&self) -> Option<BudgetEnd> {
        if (self.abandoned)() {
            return Some(BudgetEnd::Abandoned);
        }
        let (max, began) = self.cpu_time_max?;
        (thread_cpu_time().saturating_sub(began) > max).then_some(BudgetEnd::CpuTime(max))
    }
}

impl From<BudgetEnd> for PreprocessError {
    fn from(end: BudgetEnd) -> Self {
        match end {
            BudgetEnd::Abandoned => Self::Abandoned,
            BudgetEnd::CpuTime(max) => Self::CpuTimeOverLimit { max },
        }
    }
}

/// Returns the CPU time that the calling thread has used.
fn thread_cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    let nanos = u32::try_from(time.tv_nsec).unwrap_or(0);
    Duration::new(seconds, nanos)
}

/// The bytes of a file, for a decoder that reads from a source. Reading fails
/// once the budget is spent.
pub(super) struct BudgetedSource<'a> {
    bytes: Cursor<&'a [u8]>,
    budget: &'a DecodeBudget<'a>,
    /// Positions at which a chunk ends early, in rising order.
    stops: &'a [usize],
    /// Bytes that may be read before the next check.
    left: usize,
}

impl<'a> BudgetedSource<'a> {
    pub(super) fn new(bytes: &'a [u8], budget: &'a DecodeBudget<'a>) -> Self {
        Self::with_stops(bytes, budget, &[])
    }

    /// Creates a source that also checks the budget at `stops`, in rising
    /// order. At a stop, a few bytes begin work that is out of proportion to
    /// their number.
    pub(super) fn with_stops(
        bytes: &'a [u8],
        budget: &'a DecodeBudget<'a>,
        stops: &'a [usize],
    ) -> Self {
        Self {
            bytes: Cursor::new(bytes),
            budget,
            stops,
            left: 0,
        }
    }

    /// Checks the budget once a chunk has been handed out.
    fn spend(&mut self) -> io::Result<()> {
        if self.left == 0 {
            self.budget.check().map_err(io::Error::other)?;
            self.left = self.chunk();
        }
        Ok(())
    }

    /// Returns the number of bytes from here to the next check.
    fn chunk(&self) -> usize {
        let at = usize::try_from(self.bytes.position()).unwrap_or(usize::MAX);
        let next = self.stops.partition_point(|&stop| stop <= at);
        self.stops
            .get(next)
            .map_or(CHUNK_BYTES, |stop| CHUNK_BYTES.min(stop - at))
    }
}

impl Read for BudgetedSource<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.spend()?;
        let len = buffer.len().min(self.left);
        let n_bytes = self.bytes.read(&mut buffer[..len])?;
        self.left -= n_bytes;
        Ok(n_bytes)
    }
}

impl BufRead for BudgetedSource<'_> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        self.spend()?;
        let bytes = self.bytes.fill_buf()?;
        Ok(&bytes[..bytes.len().min(self.left)])
    }

    fn consume(&mut self, n_bytes: usize) {
        self.bytes.consume(n_bytes);
        self.left -= n_bytes;
    }
}

impl Seek for BudgetedSource<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        // A seek counts as one byte. Otherwise a file that is sought through
        // endlessly would never be checked.
        self.spend()?;
        self.left -= 1;
        self.bytes.seek(to)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_is_the_bytes() {
        let bytes: Vec<u8> = (0..=255).cycle().take(3 * CHUNK_BYTES + 7).collect();
        let budget = DecodeBudget::endless();
        let mut read = Vec::new();
        BudgetedSource::new(&bytes, &budget)
            .read_to_end(&mut read)
            .unwrap();
        assert_eq!(read, bytes);
        let mut source = BudgetedSource::new(&bytes, &budget);
        source.seek(SeekFrom::Start(5000)).unwrap();
        let mut four = [0; 4];
        source.read_exact(&mut four).unwrap();
        assert_eq!(four, bytes[5000..5004]);
    }

    #[test]
    fn a_source_is_checked_at_its_stops() {
        let checks = Cell::new(0);
        let abandoned = || {
            checks.set(checks.get() + 1);
            false
        };
        let budget = DecodeBudget::new(&abandoned, Duration::from_hours(1));
        let bytes = vec![0; 2 * CHUNK_BYTES];
        let mut source = BudgetedSource::with_stops(&bytes, &budget, &[0, 10, 20]);
        let mut read = Vec::new();
        source.read_to_end(&mut read).unwrap();
        assert_eq!(read, bytes);
        // Checks at 10, at 20, after a chunk, and for the rest, which includes
        // the end.
        assert_eq!(checks.get(), 4);
    }

    #[test]
    fn a_spent_budget_stays_spent() {
        let gone = Cell::new(false);
        let abandoned = || gone.get();
        let budget = DecodeBudget::new(&abandoned, Duration::from_hours(1));
        let bytes = vec![0; 3 * CHUNK_BYTES];
        let mut source = BudgetedSource::new(&bytes, &budget);
        let mut chunk = vec![0; CHUNK_BYTES];
        source.read_exact(&mut chunk).unwrap();
        gone.set(true);
        assert!(source.read_exact(&mut chunk).is_err());
        gone.set(false);
        assert!(matches!(budget.check(), Err(PreprocessError::Abandoned)));
        assert!(matches!(
            budget.error_or(PreprocessError::Empty),
            PreprocessError::Abandoned
        ));
    }

    #[test]
    fn cpu_time_is_the_threads_own() {
        let budget = DecodeBudget::new(&|| false, Duration::from_millis(20));
        assert!(budget.check().is_ok());
        while thread_cpu_time().saturating_sub(budget.cpu_time_max.unwrap().1)
            < Duration::from_millis(25)
        {
            std::hint::black_box((0..10_000_u64).sum::<u64>());
        }
        assert!(matches!(
            budget.check(),
            Err(PreprocessError::CpuTimeOverLimit { .. })
        ));
    }
}
