//! The limits of decoding, including the allocations of libraries: attacks on
//! these limits, and files that are tampered with at random.

#![warn(clippy::disallowed_methods)]
#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test that meets a surprise should stop there, and measured figures are printed"
)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::time::Duration;

use imagegpt::imaging::decode::decode;
use imagegpt::imaging::{Alpha, DecodeBudget, ImageLimits, PreprocessError, RgbImage};
use rustix::time::{ClockId, clock_gettime};

mod attacks;
mod fuzz;
mod jpeg;
mod mutate;
mod seeds;

/// Number of bytes that a decode may hold above its limit: the file itself does
/// not count, nor do error messages and the test's copies of them.
const SLACK_BYTES: u64 = 256 << 10;

/// Allocator that counts the bytes that each thread holds.
struct Counting;

thread_local! {
    static HELD: Cell<i64> = const { Cell::new(0) };
    static PEAK: Cell<i64> = const { Cell::new(0) };
}

fn count(bytes: i64) {
    HELD.set(HELD.get() + bytes);
    PEAK.set(PEAK.get().max(HELD.get()));
}

fn signed(bytes: usize) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

#[expect(
    unsafe_code,
    reason = "only an allocator sees what libraries allocate; this one passes everything on to \
              the system's and adds up sizes in cells of the thread, which allocate nothing"
)]
// SAFETY: all calls go to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(signed(layout.size()));
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(signed(layout.size()));
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(-signed(layout.size()));
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(signed(size) - signed(layout.size()));
        // SAFETY: the caller's promises are passed on.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Cost of one decode.
struct Measured {
    outcome: Result<RgbImage, PreprocessError>,
    peak_bytes: u64,
    cpu: Duration,
    /// CPU time after the caller had left.
    cpu_abandoned: Option<Duration>,
}

fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(
        u64::try_from(time.tv_sec).unwrap(),
        u32::try_from(time.tv_nsec).unwrap(),
    )
}

/// Decodes a file for a caller that leaves after `looks` checks of the budget.
fn measure(bytes: &[u8], limits: &ImageLimits, looks: Option<u32>) -> Measured {
    let looked = Cell::new(0);
    let left = Cell::new(None);
    let abandoned = || {
        looked.set(looked.get() + 1);
        let gone = looks.is_some_and(|looks| looked.get() > looks);
        if gone && left.get().is_none() {
            left.set(Some(cpu_time()));
        }
        gone
    };
    let budget = DecodeBudget::new(&abandoned, Duration::from_hours(1));
    let (held, began) = (HELD.get(), cpu_time());
    PEAK.set(held);
    let outcome = decode(bytes, Alpha::White, limits, &budget);
    let ended = cpu_time();
    Measured {
        outcome,
        peak_bytes: u64::try_from(PEAK.get() - held).unwrap(),
        cpu: ended.checked_sub(began).unwrap(),
        cpu_abandoned: left.get().map(|left| ended.checked_sub(left).unwrap()),
    }
}

#[test]
fn what_a_thread_holds_is_counted() {
    let (held, ()) = (HELD.get(), PEAK.set(HELD.get()));
    let bytes = vec![1_u8; 1 << 20];
    assert_eq!(HELD.get() - held, 1 << 20);
    drop(bytes);
    assert_eq!(HELD.get() - held, 0);
    assert!(PEAK.get() - held >= 1 << 20);
}
