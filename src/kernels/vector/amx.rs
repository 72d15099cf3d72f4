//! The matrix unit (AMX) itself: whether there is one, and its tiles' sizes. It is
//! in Intel's CPUs from Sapphire Rapids on, and Linux lets processes use it.
//!
//! The standard library's intrinsics for AMX are not stable (Rust 1.95), so the
//! instructions are written as inline assembly.
#![expect(unsafe_code, reason = "inline assembly")]
#![expect(
    clippy::inline_always,
    reason = "called around the loops that use the tiles"
)]

use std::arch::asm;
use std::arch::x86_64::__cpuid_count;
use std::sync::OnceLock;

/// Bits of the CPU's features, in leaf 7.
const BF16: u32 = 1 << 22;
const TILES: u32 = 1 << 24;
const BYTES: u32 = 1 << 25;

fn has(features: u32) -> bool {
    __cpuid_count(7, 0).edx & features == features
}

/// Returns true if the CPU has the matrix unit, whether or not this process may
/// use it.
pub(crate) fn is_present() -> bool {
    has(TILES | BF16)
}

/// Returns true if the CPU has the matrix unit, with products of bfloat16, and
/// Linux lets this process use it. Linux must be asked, because the unit's
/// registers make every thread's saved state 8 KiB larger.
pub(crate) fn is_available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| is_present() && request_permission())
}

/// Returns true if a matrix unit that is available has products of bytes, too.
pub(crate) fn has_bytes() -> bool {
    has(BYTES)
}

/// Asks Linux for the tile registers, for this process and its future threads.
#[cfg(target_os = "linux")]
fn request_permission() -> bool {
    const ARCH_PRCTL: usize = 158;
    const ARCH_REQ_XCOMP_PERM: usize = 0x1023;
    const XFEATURE_XTILEDATA: usize = 18;
    let status: isize;
    // SAFETY: a system call that takes two numbers and touches no memory of
    // ours; the kernel overwrites rcx and r11.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") ARCH_PRCTL => status,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") XFEATURE_XTILEDATA,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    status == 0
}

#[cfg(not(target_os = "linux"))]
fn request_permission() -> bool {
    false
}

/// Configuration that `ldtilecfg` reads: all eight tiles are 16 rows of 64
/// bytes.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

static CONFIG: Config = Config {
    palette: 1,
    start_row: 0,
    reserved: [0; 14],
    row_bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
    rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
};

/// Prepares the calling thread for tiles.
///
/// # Safety
/// [`is_available`] has said yes.
#[inline(always)]
pub(crate) unsafe fn begin() {
    // SAFETY: the caller vouches for the instructions; the configuration is one
    // that the unit accepts. It stays until `end`: nothing else on this thread
    // uses tiles in between.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const CONFIG, options(nostack, readonly)) }
}

/// Releases the tiles, because idle tiles would be saved at every switch of
/// threads.
///
/// # Safety
/// [`is_available`] has said yes.
#[inline(always)]
pub(crate) unsafe fn end() {
    // SAFETY: the caller vouches for the instructions.
    unsafe { asm!("tilerelease", options(nostack, nomem)) }
}
