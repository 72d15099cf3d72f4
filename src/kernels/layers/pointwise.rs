//! Operations on each number, or on each row, between products.
#![expect(
    unsafe_code,
    reason = "reads and writes vectors through raw pointers; see the contract of `Vector`"
)]
#![expect(
    clippy::inline_always,
    reason = "intrinsics only become instructions inside a function that has them"
)]

use std::f32::consts::LOG2_E;

use crate::kernels::attention::Kernel;
use crate::kernels::vector::{LANES_MAX, Portable, Vector};

/// The nonlinearity of the feed-forward part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// `x * sigmoid(1.702 x)`, with which ImageGPT was trained.
    QuickGelu,
    /// GELU with the error function.
    Gelu,
    /// GELU with the hyperbolic tangent.
    GeluNew,
    Relu,
}

impl Activation {
    pub const ALL: [Self; 4] = [Self::QuickGelu, Self::Gelu, Self::GeluNew, Self::Relu];

    /// Returns the activation's name in `config.json`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::QuickGelu => "quick_gelu",
            Self::Gelu => "gelu",
            Self::GeluNew => "gelu_new",
            Self::Relu => "relu",
        }
    }

    /// Returns the activation of this name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|one| one.name() == name)
    }
}

/// Activates every lane. A NaN stays a NaN.
///
/// # Safety
/// The CPU has the instructions of `V`.
#[inline(always)]
pub(in crate::kernels) unsafe fn activate<V: Vector>(activation: Activation, x: V) -> V {
    // SAFETY: the caller vouches for the instructions.
    unsafe {
        match activation {
            Activation::QuickGelu => {
                let size = magnitude(x);
                let tail = lower_sigmoid(size.mul(V::splat(-1.702 * LOG2_E)));
                positive(x).sub(size.mul(tail))
            }
            // A hyperbolic tangent is a sigmoid of twice its argument.
            Activation::GeluNew => {
                let size = magnitude(x);
                let inner = x.mul(x).mul_add(V::splat(0.044_715), V::splat(1.0));
                let scale = V::splat(-1.595_769 * LOG2_E);
                let tail = lower_sigmoid(size.mul(inner).mul(scale));
                positive(x).sub(size.mul(tail))
            }
            Activation::Gelu => {
                let size = magnitude(x);
                positive(x).sub(size.mul(upper_tail(size)))
            }
            Activation::Relu => positive(x),
        }
    }
}

/// Returns the larger of each lane and zero. The order of the arguments keeps a
/// NaN.
///
/// # Safety
/// The CPU has the instructions of `V`.
#[inline(always)]
unsafe fn positive<V: Vector>(x: V) -> V {
    // SAFETY: the caller vouches for the instructions.
    unsafe { V::splat(0.0) }.max(x)
}

/// Returns each lane without its sign.
///
/// # Safety
/// The CPU has the instructions of `V`.
#[inline(always)]
unsafe fn magnitude<V: Vector>(x: V) -> V {
    // SAFETY: the caller vouches for the instructions.
    unsafe { V::splat(0.0) }.sub(x).max(x)
}

/// Computes the sigmoid of `x <= 0`, which is given times log2(e): by a power
/// that is at most one. A number times its sigmoid is the number, or zero if
/// that is larger, less the number's size times the sigmoid of minus its size.
///
/// # Safety
/// The CPU has the instructions of `V`.
#[inline(always)]
unsafe fn lower_sigmoid<V: Vector>(x: V) -> V {
    let power = x.exp2();
    // SAFETY: the caller vouches for the instructions.
    power.div(unsafe { V::splat(1.0) }.add(power))
}

/// Returns the probability that a normal variable is above `x >= 0`, within
/// 1e-7 (Abramowitz and Stegun, 7.1.26).
///
/// # Safety
/// The CPU has the instructions of `V`.
#[inline(always)]
unsafe fn upper_tail<V: Vector>(x: V) -> V {
    const P: f32 = 0.327_591_1 * std::f32::consts::FRAC_1_SQRT_2;
    const A: [f32; 5] = [
        1.061_405_4,
        -1.453_152_1,
        1.421_413_8,
        -0.284_496_72,
        0.254_829_6,
    ];
    // SAFETY: the caller vouches for the instructions.
    unsafe {
        let one = V::splat(1.0);
        let t = one.div(x.mul_add(V::splat(P), one));
        let mut sum = V::splat(A[0]);
        for a in &A[1..] {
            sum = sum.mul_add(t, V::splat(*a));
        }
        let density = x.mul(x).mul(V::splat(-0.5 * LOG2_E)).exp2();
        sum.mul(t).mul(density).mul(V::splat(0.5))
    }
}

/// Divides a row's numbers by the root of their mean square, and multiplies
/// each by its weight.
///
/// # Safety
/// The kernel is available; row and weight are `width` floats and further
/// floats up to a multiple of [`LANES_MAX`]: zeros, unless the row has an
/// infinity or a NaN, which spoils the row as a whole. The output has room for
/// as many floats, and nobody else has it.
pub(in crate::kernels) unsafe fn norm(
    kernel: Kernel,
    row: *const f32,
    weight: *const f32,
    output: *mut f32,
    width: usize,
    epsilon: f32,
) {
    let norm = Norm {
        row,
        weight,
        output,
        width,
        epsilon,
    };
    // SAFETY: the caller vouches for all of it.
    unsafe {
        match kernel {
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx2 => norm.avx2(),
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx512 | Kernel::Avx512Bf16 | Kernel::Amx => norm.avx512(),
            _ => norm.run::<Portable>(),
        }
    }
}

struct Norm {
    row: *const f32,
    weight: *const f32,
    output: *mut f32,
    width: usize,
    epsilon: f32,
}

impl Norm {
    /// Runs the norm with AVX2.
    ///
    /// # Safety
    /// The CPU has AVX2 and FMA, and the contract of [`norm`] holds.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn avx2(&self) {
        // SAFETY: the caller vouches for all of it.
        unsafe { self.run::<crate::kernels::vector::avx2::Avx2>() }
    }

    /// Runs the norm with AVX-512.
    ///
    /// # Safety
    /// The CPU has AVX-512 F, DQ and BW, and the contract of [`norm`] holds.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512dq,avx512bw")]
    unsafe fn avx512(&self) {
        // SAFETY: the caller vouches for all of it.
        unsafe { self.run::<crate::kernels::vector::avx512::Avx512>() }
    }

    /// Runs the norm with the vectors `V`.
    ///
    /// # Safety
    /// The CPU has the instructions of `V`, and the contract of [`norm`] holds.
    #[inline(always)]
    unsafe fn run<V: Vector>(&self) {
        // SAFETY: all accesses are whole vectors, which the caller vouches for.
        unsafe {
            let mut squares = V::splat(0.0);
            for at in (0..self.width).step_by(V::LANES) {
                let x = V::load(self.row.add(at));
                squares = x.mul_add(x, squares);
            }
            let mut lanes = [0.0_f32; LANES_MAX];
            squares.store(lanes.as_mut_ptr());
            #[expect(clippy::cast_precision_loss, reason = "widths are small")]
            let mean = lanes[..V::LANES].iter().sum::<f32>() / self.width as f32;
            let factor = V::splat(1.0 / (mean + self.epsilon).sqrt());
            for at in (0..self.width).step_by(V::LANES) {
                let x = V::load(self.row.add(at)).mul(factor);
                x.mul(V::load(self.weight.add(at)))
                    .store(self.output.add(at));
            }
        }
    }
}
