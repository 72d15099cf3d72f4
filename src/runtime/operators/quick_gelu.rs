//! The operators `imagegpt.QuickGeluFp16` and `imagegpt.QuickGeluBf16`,
//! quick-gelu in 16 bits by the GPU kernel of [`crate::gpu`].
//!
//! Their inputs and outputs:
//!
//! | | |
//! |---|---|
//! | input 0 | `x`, fp16 or bf16, of any shape |
//! | output 0 | `x / (1 + exp(-1.702 x))`, with the type and shape of `x` |
//!
//! The CPU has the operators too, so that graphs for a GPU can be verified
//! without a GPU.
#![expect(unsafe_code, reason = "a GPU's memory is known by its address alone")]

use std::ffi::c_void;
use std::ptr::NonNull;

use half::{bf16, f16};
use ort::operator::{
    ComputeContext, Kernel, KernelContext, Operator, OperatorInput, OperatorOutput,
    ShapeInferenceContext,
};
use ort::value::{DynTensorRef, DynTensorRefMut, PrimitiveTensorElementType, TensorElementType};

use super::{inputs, output};
use crate::gpu::kernels::{self, Half, Numbers};
use crate::model::precision::Provider;

/// Name of the fp16 operator within [`DOMAIN`](super::DOMAIN).
pub const QUICK_GELU_FP16: &str = "QuickGeluFp16";
/// Name of the bf16 operator within [`DOMAIN`](super::DOMAIN).
pub const QUICK_GELU_BF16: &str = "QuickGeluBf16";

/// Factor in the exponent of quick-gelu.
pub const FACTOR: f32 = 1.702;

#[derive(Clone, Copy)]
pub(super) struct QuickGelu {
    pub(super) half: Half,
    pub(super) provider: Provider,
}

impl QuickGelu {
    fn element(self) -> TensorElementType {
        match self.half {
            Half::Fp16 => TensorElementType::Float16,
            Half::Bf16 => TensorElementType::Bfloat16,
        }
    }
}

impl Operator for QuickGelu {
    type Kernel<'attr> = Self;

    fn name(&self) -> &str {
        match self.half {
            Half::Fp16 => QUICK_GELU_FP16,
            Half::Bf16 => QUICK_GELU_BF16,
        }
    }

    fn execution_provider_type(&self) -> Option<&str> {
        Some(self.provider.runtime_name())
    }

    fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
        [OperatorInput::required(self.element())]
    }

    fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
        [OperatorOutput::required(self.element())]
    }

    fn create_kernel(&self, _context: &KernelContext<'_>) -> ort::Result<Self> {
        Ok(*self)
    }

    fn infer_shape(&self, context: &mut ShapeInferenceContext) -> ort::Result<()> {
        match context.inputs().into_iter().next() {
            Some(x) => super::infer_same(context, 0, &x),
            None => Ok(()),
        }
    }
}

impl Kernel for QuickGelu {
    fn compute(&mut self, context: &ComputeContext) -> ort::Result<()> {
        let [x] = inputs(context)?;
        let shape = x.shape().clone();
        let n = shape.num_elements();
        let mut y = output(context, 0, shape)?;
        if self.provider == Provider::Cpu {
            return match self.half {
                Half::Fp16 => on_cpu(&x, &mut y, f16::to_f32, f16::from_f32),
                Half::Bf16 => on_cpu(&x, &mut y, bf16::to_f32, bf16::from_f32),
            };
        }
        let stream = stream(context.stream()?)?;
        let numbers = Numbers {
            x: x.data_ptr().cast(),
            y: y.data_ptr().cast_mut().cast(),
            n,
        };
        // SAFETY: ONNX Runtime has made the device current for this thread and
        // passes its stream. It gives the memory of both tensors only to later
        // work of that stream, and allocates at multiples of 256 bytes. A run
        // that is captured is launched again only while its session, which owns
        // that memory, is alive.
        unsafe { kernels::quick_gelu(self.half, numbers, FACTOR, stream) }.map_err(ort::Error::new)
    }
}

/// Returns the stream that a run gave its operators. Without one the kernel
/// would run on the default stream, beside the run that it belongs to, and would
/// read and write numbers too early.
fn stream<T>(given: Option<NonNull<T>>) -> ort::Result<*mut c_void> {
    let stream = given.ok_or_else(|| {
        ort::Error::new("ONNX Runtime gave quick-gelu no CUDA stream, on which it must run")
    })?;
    Ok(stream.as_ptr().cast())
}

fn on_cpu<T: PrimitiveTensorElementType + Copy>(
    x: &DynTensorRef<'_>,
    y: &mut DynTensorRefMut<'_>,
    widen: fn(T) -> f32,
    narrow: fn(f32) -> T,
) -> ort::Result<()> {
    let (_, x) = x.try_extract_tensor::<T>()?;
    let (_, y) = y.try_extract_tensor_mut::<T>()?;
    for (y, x) in y.iter_mut().zip(x) {
        let x = widen(*x);
        *y = narrow(x / (1.0 + (-FACTOR * x).exp()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_without_a_stream_is_an_error() {
        let error = stream::<u8>(None).unwrap_err().to_string();
        assert!(error.contains("no CUDA stream"), "{error}");
        let mut value = 7;
        let given = NonNull::from(&mut value);
        assert_eq!(stream(Some(given)).unwrap(), given.as_ptr().cast());
    }
}
