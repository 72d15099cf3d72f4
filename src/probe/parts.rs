//! Rows in parts whose sums are added in a fixed order, by any number of threads.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

/// Rows that are never split: parts are whole blocks.
pub(super) const BLOCK_ROWS: usize = 128;

/// Most parts: enough that 16 threads end at about the same time, and few enough
/// that adding their sums costs nothing beside making them.
const PARTS_MAX: usize = 64;
/// Fewest parts of many rows, whatever a part's sums take.
const PARTS_MIN: usize = 4;
/// Bytes of the sums of all parts, in f64, beyond which there are fewer parts. With
/// 10 classes of 512 all 64 parts take 2.8 MB, with 1000 classes 14 parts take it
/// all; the largest probe ([`super::WEIGHTS_MAX`]) has the fewest, 512 MB.
const SUMS_BYTES_MAX: usize = 64 << 20;

/// Partition of rows, which depends on sizes alone and so not on the threads.
#[derive(Debug, Clone, Copy)]
pub(super) struct RowParts {
    n_rows: usize,
    n_parts: usize,
}

impl RowParts {
    /// Splits `n_rows` for sums of `n_sums` numbers per part.
    pub(super) fn new(n_rows: usize, n_sums: usize) -> Self {
        let in_memory = SUMS_BYTES_MAX / (size_of::<f64>() * n_sums.max(1));
        let n_blocks = n_rows.div_ceil(BLOCK_ROWS);
        let n_parts = in_memory.clamp(PARTS_MIN, PARTS_MAX).min(n_blocks.max(1));
        Self { n_rows, n_parts }
    }

    /// Returns the rows of a part: whole blocks, but for the last of all.
    fn rows(self, part: usize) -> Range<usize> {
        let n_blocks = self.n_rows.div_ceil(BLOCK_ROWS);
        let bound = |part: usize| (n_blocks * part / self.n_parts * BLOCK_ROWS).min(self.n_rows);
        bound(part)..bound(part + 1)
    }

    /// Returns the results of `work` over the rows of each part, in their order.
    pub(super) fn map<T: Send>(
        self,
        n_threads: usize,
        work: impl Fn(Range<usize>) -> T + Sync,
    ) -> Vec<T> {
        in_order(self.n_parts, n_threads, |part| work(self.rows(part)))
    }
}

/// Returns the results of `work` for `0..n`, in this order, by at most `n_threads`
/// threads, of which the caller's is one. Without a thread more (the system may
/// refuse one) the caller's does all.
pub(super) fn in_order<T: Send>(
    n: usize,
    n_threads: usize,
    work: impl Fn(usize) -> T + Sync,
) -> Vec<T> {
    if n_threads <= 1 || n <= 1 {
        return (0..n).map(work).collect();
    }
    let next = AtomicUsize::new(0);
    let take = || {
        let mut done = Vec::new();
        loop {
            let item = next.fetch_add(1, Ordering::Relaxed);
            if item >= n {
                return done;
            }
            done.push((item, work(item)));
        }
    };
    let mut done = thread::scope(|scope| {
        let helpers: Vec<_> = (1..n_threads.min(n))
            .map_while(|idx| {
                let builder = thread::Builder::new().name(format!("probe-{idx}"));
                builder.spawn_scoped(scope, take).ok()
            })
            .collect();
        let mut done = take();
        for helper in helpers {
            match helper.join() {
                Ok(more) => done.extend(more),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        done
    });
    done.sort_unstable_by_key(|(item, _)| *item);
    done.into_iter().map(|(_, result)| result).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_all_rows_once_and_in_order() {
        for n_rows in [0, 1, 127, 128, 129, 5000, 100_000] {
            for n_sums in [1, 5120, 1 << 24] {
                let parts = RowParts::new(n_rows, n_sums);
                for n_threads in [1, 3] {
                    let ranges = parts.map(n_threads, |rows| rows);
                    assert!(ranges.len() <= PARTS_MAX);
                    assert_eq!((ranges[0].start, ranges[ranges.len() - 1].end), (0, n_rows));
                    for pair in ranges.windows(2) {
                        assert_eq!(pair[0].end, pair[1].start);
                        assert_eq!(pair[0].end % BLOCK_ROWS, 0);
                    }
                }
            }
        }
        assert_eq!(RowParts::new(1 << 20, 10 * 552).n_parts, PARTS_MAX);
        assert_eq!(RowParts::new(1 << 20, 1 << 24).n_parts, PARTS_MIN);
    }

    #[test]
    fn a_panic_of_a_part_is_a_panic() {
        let panicked = std::panic::catch_unwind(|| {
            in_order(10, 2, |item| assert_ne!(item, 7, "planted"));
        });
        assert!(panicked.is_err());
    }
}
