//! Memory for weights, on large pages if the system has them: a step reads
//! hundreds of megabytes in order, and looking up a page for every 4 KiB takes
//! a tenth of the step's time.

use std::marker::PhantomData;

use bytemuck::Pod;
use memmap2::MmapMut;

use super::LayersError;

/// Size of a large page, in bytes.
const LARGE: usize = 2 << 20;

/// Owned numbers that begin on a large page.
#[derive(Debug)]
pub(in crate::kernels) struct LargePages<T> {
    map: MmapMut,
    /// Offset of the first number, in bytes.
    start: usize,
    n_bytes: usize,
    numbers: PhantomData<T>,
}

impl<T: Pod> LargePages<T> {
    pub(in crate::kernels) fn zeroed(n_numbers: usize) -> Result<Self, LayersError> {
        let n_bytes = n_numbers * size_of::<T>();
        let failed = LayersError::Memory(n_bytes);
        // Addresses cost nothing; only pages that are written do.
        let room = n_bytes.checked_add(LARGE).ok_or(failed)?;
        let map = MmapMut::map_anon(room).map_err(|_| failed)?;
        let start = map.as_ptr().align_offset(LARGE);
        // Without large pages the memory is slower, but not wrong.
        #[cfg(target_os = "linux")]
        let _ = map.advise_range(memmap2::Advice::HugePage, start, n_bytes);
        Ok(Self {
            map,
            start,
            n_bytes,
            numbers: PhantomData,
        })
    }

    pub(in crate::kernels) fn numbers(&self) -> &[T] {
        bytemuck::cast_slice(&self.map[self.start..][..self.n_bytes])
    }

    pub(in crate::kernels) fn numbers_mut(&mut self) -> &mut [T] {
        bytemuck::cast_slice_mut(&mut self.map[self.start..][..self.n_bytes])
    }
}
