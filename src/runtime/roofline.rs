//! Measures the rate of a large matrix product in the model's runtime (the
//! roofline), as the ceiling of the model's own rate.
//!
//! A device's data sheet promises more than any program reaches, so the ceiling
//! is measured: products of square matrices that are large enough to fill the
//! device, are already in its memory, and hold random numbers (zeros take less
//! power, and so run faster). A model is slower than the ceiling because of its
//! smaller products, attention, norms and kernel launches.

use std::path::Path;
use std::time::{Duration, Instant};

use half::{bf16, f16};
use ort::memory::{AllocationDevice, AllocatorType, MemoryInfo, MemoryType};
use ort::session::builder::SessionBuilder;
use ort::session::{IoBinding, Session};
use ort::value::{DynTensor, Tensor};
use prost::Message as _;

use super::error::EngineError;
use super::failure::{Failures, leak_if_lost};
use super::{Residence, Runtime};
use crate::model::onnx::{
    DataType, Dim, GraphProto, IR_VERSION, ModelProto, NodeProto, OPSET, OperatorSet,
    TensorProto as Constant, ValueInfoProto,
};
use crate::model::precision::{Precision, Provider};

/// Settings of the measurement.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RooflineOptions<'a> {
    /// Path of the runtime's library.
    pub library: &'a Path,
    pub provider: Provider,
    pub device_id: i32,
    /// Number of threads, as in the engine; 0 uses one thread per physical
    /// core.
    pub intra_op_threads: usize,
    /// Precision of the model. For int8, and for bf16 on a CPU, the roofline is
    /// measured in fp32, although most of such a model is computed in fewer
    /// bits: its fraction may exceed 1.
    pub precision: Precision,
}

/// Returns the type of the numbers that are multiplied, and its name. ONNX Runtime
/// has no product of 8 bits that would be one, and on a CPU none of bfloat16.
fn products_in(precision: Precision, provider: Provider) -> (DataType, &'static str) {
    match (precision, provider) {
        (Precision::Fp32 | Precision::Int8, _) | (Precision::Bf16, Provider::Cpu) => {
            (DataType::Float, "fp32")
        }
        (Precision::Fp16, _) => (DataType::Float16, "fp16"),
        (Precision::Bf16, Provider::Cuda) => (DataType::Bfloat16, "bf16"),
    }
}

/// Measurement of a device's roofline, with a session that is ready to run.
pub(crate) struct Roofline {
    /// Number of rows and of columns of the matrices.
    pub side: usize,
    /// Precision of the products: "fp32", "fp16" or "bf16".
    pub precision: &'static str,
    /// Binding of the session's input and output; dropped before the session,
    /// to which it refers.
    binding: IoBinding,
    session: Session,
    n_products: usize,
    failures: Failures,
}

impl Roofline {
    /// Creates the matrices and warms up the device.
    ///
    /// # Errors
    ///
    /// When the library or the provider cannot be used, or memory does not
    /// suffice.
    pub(crate) fn new(options: &RooflineOptions<'_>) -> Result<Self, EngineError> {
        let runtime_error = |error: ort::Error| EngineError::Runtime(error.to_string());
        let (data_type, precision) = products_in(options.precision, options.provider);
        // About 0.1 s on a CPU; on a GPU long enough that the start of a run
        // does not matter.
        let (side, n_products) = match options.provider {
            Provider::Cpu => (2048, 1),
            Provider::Cuda => (8192, 8),
        };
        let environment = crate::runtime::library::environment(options.library)?;
        let runtime = Runtime {
            device_id: options.device_id,
            n_threads: options.intra_op_threads,
            residence: Residence::Packed,
            ..Runtime::new(environment, options.provider).map_err(runtime_error)?
        };
        let factor = numbers(side);
        let model = chain(side, n_products, data_type, &factor).encode_to_vec();
        let failures = Failures::of(&runtime);
        let open = |mut builder: SessionBuilder| builder.commit_from_memory(&model);
        let session = runtime.builder().and_then(open);
        let session = session.map_err(|error| failures.run(&error))?;
        let bind = || -> ort::Result<IoBinding> {
            let mut binding = session.create_binding()?;
            // Copied to the device now, not in every run.
            binding.bind_input("x", &tensor(side, data_type, factor)?)?;
            let device = match options.provider {
                Provider::Cpu => AllocationDevice::CPU,
                Provider::Cuda => AllocationDevice::CUDA,
            };
            let memory = MemoryInfo::new(
                device,
                options.device_id,
                AllocatorType::Device,
                MemoryType::Default,
            )?;
            binding.bind_output_to_device("y", &memory)?;
            Ok(binding)
        };
        let binding = match bind() {
            Ok(binding) => binding,
            Err(error) => {
                let error = failures.run(error);
                leak_if_lost(session, &error);
                return Err(error);
            }
        };
        let mut roofline = Self {
            side,
            precision,
            binding,
            session,
            n_products,
            failures,
        };
        match roofline.run().and_then(|_| roofline.run()) {
            Ok(_) => Ok(roofline),
            Err(error) => {
                leak_if_lost(roofline, &error);
                Err(error)
            }
        }
    }

    /// Returns the number of multiplications and additions of one run.
    #[must_use]
    pub(crate) fn flop(&self) -> u64 {
        (2 * self.n_products * self.side.pow(3)) as u64
    }

    /// Computes the products once and returns how long this took.
    ///
    /// # Errors
    ///
    /// When the run failed.
    pub(crate) fn run(&mut self) -> Result<Duration, EngineError> {
        let started = Instant::now();
        // The call returns when the device has finished.
        self.session
            .run_binding(&self.binding)
            .map_err(|error| self.failures.run(error))?;
        Ok(started.elapsed())
    }
}

/// Builds the graph of a chain of products, x W W ⋯ W.
pub(super) fn chain(
    side: usize,
    n_products: usize,
    data_type: DataType,
    factor: &[f32],
) -> ModelProto {
    let name = |idx: usize| match idx {
        0 => "x".to_owned(),
        _ if idx == n_products => "y".to_owned(),
        _ => format!("x.{idx}"),
    };
    let node = (0..n_products).map(|idx| NodeProto {
        input: vec![name(idx), "w".to_owned()],
        output: vec![name(idx + 1)],
        name: format!("product.{idx}"),
        op_type: "MatMul".to_owned(),
        ..NodeProto::default()
    });
    let shape = [Dim::Size(side), Dim::Size(side)];
    let weight = Constant {
        dims: vec![i64::try_from(side).unwrap_or(i64::MAX); 2],
        data_type: data_type.into(),
        name: "w".to_owned(),
        raw_data: data_type.bytes(factor),
        ..Constant::default()
    };
    ModelProto {
        ir_version: IR_VERSION,
        opset_import: vec![OperatorSet {
            domain: String::new(),
            version: OPSET,
        }],
        producer_name: env!("CARGO_PKG_NAME").to_owned(),
        producer_version: env!("CARGO_PKG_VERSION").to_owned(),
        graph: Some(GraphProto {
            node: node.collect(),
            name: "roofline".to_owned(),
            initializer: vec![weight],
            input: vec![ValueInfoProto::tensor("x", data_type, &shape)],
            output: vec![ValueInfoProto::tensor("y", data_type, &shape)],
        }),
    }
}

/// Returns random numbers for a square matrix whose products have about the
/// same norm as their inputs.
fn numbers(side: usize) -> Vec<f32> {
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        reason = "a scale need not be exact"
    )]
    let scale = (3.0 / side as f64).sqrt() as f32;
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    (0..side * side)
        .map(|_| {
            // xorshift64: the numbers have only to look random.
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let bits = (state >> 48) as u16;
            (f32::from(bits) / 32767.5 - 1.0) * scale
        })
        .collect()
}

fn tensor(side: usize, data_type: DataType, values: Vec<f32>) -> ort::Result<DynTensor> {
    let shape = [side, side];
    Ok(match data_type {
        DataType::Float16 => {
            let values: Vec<f16> = values.into_iter().map(f16::from_f32).collect();
            Tensor::from_array((shape, values))?.upcast()
        }
        DataType::Bfloat16 => {
            let values: Vec<bf16> = values.into_iter().map(bf16::from_f32).collect();
            Tensor::from_array((shape, values))?.upcast()
        }
        _ => Tensor::from_array((shape, values))?.upcast(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_run_one_into_the_next() {
        let graph = chain(2, 3, DataType::Float, &[0.0; 4]).graph.unwrap();
        let wires: Vec<(&str, &str)> = graph
            .node
            .iter()
            .map(|node| (node.input[0].as_str(), node.output[0].as_str()))
            .collect();
        assert_eq!(wires, [("x", "x.1"), ("x.1", "x.2"), ("x.2", "y")]);
    }

    #[test]
    fn a_product_keeps_its_length() {
        let values = numbers(512);
        let mean = |power| {
            let powers = values.iter().map(|&value| f64::from(value).powi(power));
            powers.sum::<f64>() / f64::from(512 * 512)
        };
        assert!(mean(1).abs() < 1e-3);
        assert!((mean(2) * 512.0 - 1.0).abs() < 0.02);
    }
}
