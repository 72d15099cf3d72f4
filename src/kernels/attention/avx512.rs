//! AVX-512 (F, DQ and BW): 16 queries a vector, 4 vectors by 6 rows of accumulators.
#![expect(
    unsafe_code,
    reason = "calls what the CPU was asked for, with raw pointers"
)]

use super::cached_tile::{self, Work};
use super::tile::{self, Block, Head};
use crate::kernels::vector::Kept;
use crate::kernels::vector::avx512::Avx512;
use crate::kernels::vector::scratch::Scratch;

/// # Safety
/// The CPU has AVX-512 F, DQ and BW; and as [`tile::attend`].
#[target_feature(enable = "avx512f,avx512dq,avx512bw")]
pub(super) unsafe fn attend(
    head: &Head,
    next: &mut dyn FnMut() -> Option<Block>,
    scratch: &mut Scratch,
) {
    // SAFETY: the caller vouches for the instructions and the rows.
    unsafe { tile::attend::<Avx512, 6, 4>(head, next, scratch) }
}

/// # Safety
/// The CPU has AVX-512 F, DQ and BW; and as [`cached_tile::attend`].
#[target_feature(enable = "avx512f,avx512dq,avx512bw")]
pub(super) unsafe fn attend_cached<K: Kept>(work: &Work<'_, K>, scratch: &mut Scratch) {
    // SAFETY: the caller vouches for the instructions and the heads.
    unsafe { cached_tile::attend::<K, Avx512, 4, 4>(work, scratch) }
}
