//! The kernel of [`crate::dense`] as an operator.
//!
//! `imagegpt.Dense`, `x W + bias + residual`:
//!
//! | | |
//! |---|---|
//! | input 0 | `x`, f32, `(rows, inputs)` |
//! | input 1 | `W`, f32, `(inputs, outputs)`: a constant, which is put in order once |
//! | input 2 | `bias`, f32, `(outputs)`, may be absent |
//! | input 3 | `residual`, f32, `(rows, outputs)`, may be absent |
//! | output 0 | f32, `(rows, outputs)` |

use ort::operator::{
    ComputeContext, Kernel, KernelContext, Operator, OperatorInput, OperatorOutput,
};
use ort::value::{DynTensorRef, DynTensorValueType, TensorElementType};

use crate::dense::{Operands, Panels};

/// The name of the operator within [`DOMAIN`](super::DOMAIN).
pub const DENSE: &str = "Dense";

pub(super) struct DenseOp;

impl Operator for DenseOp {
    type Kernel<'attr> = DenseKernel;

    fn name(&self) -> &str {
        DENSE
    }

    fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
        let float = TensorElementType::Float32;
        [
            OperatorInput::required(float),
            OperatorInput::required(float),
            OperatorInput::optional(float),
            OperatorInput::optional(float),
        ]
    }

    fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
        [OperatorOutput::required(TensorElementType::Float32)]
    }

    fn create_kernel(&self, context: &KernelContext<'_>) -> ort::Result<DenseKernel> {
        let weights = context.constant_input::<DynTensorValueType>(1)?;
        let (dims, weights) = weights.try_extract_tensor::<f32>()?;
        let &[inputs, outputs] = &dims[..] else {
            return Err(ort::Error::new(format!(
                "weights of {dims} are not (inputs, outputs)"
            )));
        };
        let size = |extent: i64| usize::try_from(extent).map_err(ort::Error::wrap);
        let panels =
            Panels::pack(weights, size(inputs)?, size(outputs)?).map_err(ort::Error::wrap)?;
        Ok(DenseKernel {
            panels,
            outputs,
            scratch: Vec::new(),
        })
    }
}

pub(super) struct DenseKernel {
    panels: Panels,
    outputs: i64,
    /// Rows in the kernel's order; as large as the largest call.
    scratch: Vec<f32>,
}

impl Kernel for DenseKernel {
    fn compute(&mut self, context: &ComputeContext) -> ort::Result<()> {
        let [rows, bias, residual] = [0, 2, 3].map(|idx| optional(context, idx));
        let (rows, bias, residual) = (rows?, bias?, residual?);
        let rows = rows.ok_or_else(|| ort::Error::new("the input is missing"))?;
        let (dims, rows) = rows.try_extract_tensor::<f32>()?;
        let &[n_rows, _] = &dims[..] else {
            return Err(ort::Error::new(format!(
                "an input of {dims} is not (rows, inputs)"
            )));
        };
        let operands = Operands {
            rows,
            bias: floats(bias.as_ref())?,
            residual: floats(residual.as_ref())?,
        };
        let mut output = super::output(context, 0, [n_rows, self.outputs])?;
        let (_, output) = output.try_extract_tensor_mut::<f32>()?;
        let job = self
            .panels
            .job(operands, output, &mut self.scratch)
            .map_err(ort::Error::wrap)?;
        if job.n_panels() == 0 {
            return Ok(());
        }
        // Each thread's first call takes panels until none is left; the calls
        // after that find nothing to do.
        context.par_for(job.n_panels(), 0, |_| job.work())
    }
}

/// An input that need not be there.
fn optional(context: &ComputeContext, idx: usize) -> ort::Result<Option<DynTensorRef<'_>>> {
    if idx >= context.num_inputs()? {
        return Ok(None);
    }
    context
        .input(idx)?
        .map(ort::value::ValueRef::downcast)
        .transpose()
}

fn floats<'a>(tensor: Option<&'a DynTensorRef<'_>>) -> ort::Result<Option<&'a [f32]>> {
    let extracted = tensor.map(|tensor| tensor.try_extract_tensor::<f32>());
    Ok(extracted.transpose()?.map(|(_, floats)| floats))
}
