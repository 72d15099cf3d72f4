//! Memory between pages that nobody may touch, so that a test that reads or writes
//! past an end dies.
#![expect(
    unsafe_code,
    reason = "takes the rights to pages away, by a function of the C library"
)]

use std::ffi::{c_int, c_void};

use memmap2::MmapMut;

/// Multiple of the sizes of pages.
const PAGE: usize = 64 << 10;

/// End of the memory at which a guard page is next to the numbers.
#[derive(Clone, Copy, Debug)]
pub(super) enum GuardedEnd {
    First,
    Last,
}

/// Floats between two guard pages.
pub(super) struct Guarded {
    map: MmapMut,
    /// Offset of the first float, in bytes.
    start: usize,
    n: usize,
}

unsafe extern "C" {
    fn mprotect(start: *mut c_void, n_bytes: usize, rights: c_int) -> c_int;
}

impl Guarded {
    /// Returns NaN everywhere.
    pub(super) fn new(n: usize, end: GuardedEnd) -> Self {
        let n_bytes = n * size_of::<f32>();
        let inside = n_bytes.next_multiple_of(PAGE);
        let map = MmapMut::map_anon(inside + 2 * PAGE).expect("a few pages are free");
        for guard in [0, PAGE + inside] {
            let guard = map.as_ptr().wrapping_add(guard).cast_mut();
            // SAFETY: these pages are the map's, and are never used.
            let status = unsafe { mprotect(guard.cast(), PAGE, 0) };
            assert_eq!(status, 0, "{}", std::io::Error::last_os_error());
        }
        let start = match end {
            GuardedEnd::First => PAGE,
            GuardedEnd::Last => PAGE + inside - n_bytes,
        };
        let mut guarded = Self { map, start, n };
        guarded.fill(f32::NAN);
        guarded
    }

    pub(super) fn of(floats: &[f32], end: GuardedEnd) -> Self {
        let mut guarded = Self::new(floats.len(), end);
        guarded.copy_from_slice(floats);
        guarded
    }
}

impl std::ops::Deref for Guarded {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        let start = self.map.as_ptr().wrapping_add(self.start);
        // SAFETY: there are as many floats, on a multiple of their size.
        unsafe { std::slice::from_raw_parts(start.cast(), self.n) }
    }
}

impl std::ops::DerefMut for Guarded {
    fn deref_mut(&mut self) -> &mut [f32] {
        let start = self.map.as_mut_ptr().wrapping_add(self.start);
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(start.cast(), self.n) }
    }
}
