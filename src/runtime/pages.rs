//! Pages of memory that nobody reads any more.
#![expect(
    unsafe_code,
    reason = "memory is given back to the system inside an allocation"
)]

use ort::value::{DynTensorValueType, DynValue};
use rustix::mm::Advice;

/// Gives the memory of a tensor's whole pages back to the system, after which
/// its numbers are zeros.
pub(crate) fn give_back(value: &DynValue, bytes: u64) {
    let Ok(tensor) = value.view().downcast::<DynTensorValueType>() else {
        return;
    };
    let page = rustix::param::page_size();
    let start = tensor.data_ptr().addr();
    let end = start.saturating_add(usize::try_from(bytes).unwrap_or(0)) / page * page;
    let first = start.next_multiple_of(page);
    if first >= end {
        return;
    }
    let pages = tensor
        .data_ptr()
        .wrapping_byte_add(first - start)
        .cast_mut();
    // SAFETY: the pages lie within an allocation of the tensor alone, whose
    // memory is private and anonymous, so afterwards they can be read and written
    // as before. No one reads the tensor at this moment, and any numbers are
    // valid ones.
    let given = unsafe { rustix::mm::madvise(pages.cast(), end - first, Advice::LinuxDontNeed) };
    // Locked memory, for one, stays; then it is only not given back.
    if let Err(error) = given {
        tracing::debug!(%error, "cannot give the memory of packed weights back");
    }
}

#[cfg(test)]
mod tests {
    use ort::value::Tensor;

    use super::*;
    use crate::runtime::library::{environment, find_library};

    #[test]
    fn memory_that_is_given_back_can_be_used() {
        environment(&find_library(None)).unwrap();
        let page = rustix::param::page_size();
        let bytes = 8 * page + 3;
        let tensor = Tensor::from_array(([bytes], vec![1_u8; bytes])).unwrap();
        let value = tensor.into_dyn();
        give_back(&value, bytes as u64);
        let (_, numbers) = value.try_extract_tensor::<u8>().unwrap();
        // All ones, but for seven or eight whole pages.
        let n_ones: usize = numbers.iter().copied().map(usize::from).sum();
        let n_zeros = bytes - n_ones;
        assert!(n_zeros >= 7 * page && n_zeros <= 8 * page, "{n_zeros}");
    }
}
