//! AVX2 and FMA: 8 queries per vector, 2 vectors by 6 rows of accumulators.
#![expect(
    unsafe_code,
    reason = "calls instructions for which the CPU was checked, with raw pointers"
)]

use super::cached_tile::{self, TileWork};
use super::tile::{self, Block, HeadView};
use crate::kernels::vector::Kept;
use crate::kernels::vector::avx2::Avx2;
use crate::kernels::vector::scratch::AlignedScratch;

/// # Safety
/// The CPU has AVX2 and FMA, and the contract of [`tile::attend`] holds.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn attend(
    head: &HeadView,
    next: &mut dyn FnMut() -> Option<Block>,
    scratch: &mut AlignedScratch,
) {
    // SAFETY: the caller vouches for the instructions and the rows.
    unsafe { tile::attend::<Avx2, 6, 2>(head, next, scratch) }
}

/// # Safety
/// The CPU has AVX2 and FMA, and the contract of [`cached_tile::attend`] holds.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn attend_cached<K: Kept>(work: &TileWork<'_, K>, scratch: &mut AlignedScratch) {
    // SAFETY: the caller vouches for the instructions and the heads.
    unsafe { cached_tile::attend::<K, Avx2, 2, 4>(work, scratch) }
}
