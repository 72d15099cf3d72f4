//! AVX-512 (F, DQ and BW): 16 queries per vector, 4 vectors by 6 rows of
//! accumulators.
#![expect(
    unsafe_code,
    reason = "calls instructions for which the CPU was checked, with raw pointers"
)]

use super::cached_tile::{self, TileWork};
use super::tile::{self, Block, HeadView};
use crate::kernels::vector::Kept;
use crate::kernels::vector::avx512::Avx512;
use crate::kernels::vector::scratch::AlignedScratch;

/// # Safety
/// The CPU has AVX-512 F, DQ and BW, and the contract of [`tile::attend`]
/// holds.
#[target_feature(enable = "avx512f,avx512dq,avx512bw")]
pub(super) unsafe fn attend(
    head: &HeadView,
    next: &mut dyn FnMut() -> Option<Block>,
    scratch: &mut AlignedScratch,
) {
    // SAFETY: the caller vouches for the instructions and the rows.
    unsafe { tile::attend::<Avx512, 6, 4>(head, next, scratch) }
}

/// # Safety
/// The CPU has AVX-512 F, DQ and BW, and the contract of
/// [`cached_tile::attend`] holds.
#[target_feature(enable = "avx512f,avx512dq,avx512bw")]
pub(super) unsafe fn attend_cached<K: Kept>(work: &TileWork<'_, K>, scratch: &mut AlignedScratch) {
    // SAFETY: the caller vouches for the instructions and the heads.
    unsafe { cached_tile::attend::<K, Avx512, 4, 4>(work, scratch) }
}
