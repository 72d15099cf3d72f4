//! Step of all slots, whose inputs and outputs are in memory of the device, so
//! that it can be captured as one CUDA graph.

use ort::memory::Allocator;
use ort::session::{IoBinding, RunOptions, Session};
use ort::value::Tensor;

use super::super::copies::EngineCopies;
use super::super::whole_images::GRAPH_ID;
use super::SequenceEngine;
use crate::engine::{RunSpan, SlotFeedRow};
use crate::runtime::error::{EngineError, runtime};

/// Inputs of a step that change from step to step.
const STEP_INPUTS: [&str; 3] = ["input_ids", "position_ids", "seqlens_k"];
/// Id of the captured step, the only one of its session.
const STEP_GRAPH: &str = "1";

/// Inputs and outputs of a step other than keys and values.
struct Placed {
    /// Inputs in the order of [`STEP_INPUTS`].
    tokens: [Tensor<i32>; 3],
    logits: Tensor<f32>,
}

impl Placed {
    fn new(allocator: &Allocator, n_rows: usize, n_colors: usize) -> ort::Result<Self> {
        Ok(Self {
            tokens: [
                Tensor::new(allocator, [n_rows, 1])?,
                Tensor::new(allocator, [n_rows, 1])?,
                Tensor::new(allocator, [n_rows])?,
            ],
            logits: Tensor::new(allocator, [n_rows, n_colors])?,
        })
    }
}

/// Step of all slots, bound once to memory of the device.
pub(super) struct Step {
    pub(super) n_rows: usize,
    /// Binding of the tensors below, before which it is dropped.
    binding: IoBinding,
    host: Placed,
    device: Placed,
    options: RunOptions,
}

impl Step {
    /// Runs the step and returns the logits of all rows.
    pub(super) fn run(
        &mut self,
        session: &mut Session,
        rows: &[SlotFeedRow<'_>],
        copies: &mut EngineCopies,
        span: &mut Option<RunSpan>,
    ) -> Result<&[f32], EngineError> {
        let int32 = |size: usize| i32::try_from(size).unwrap_or(i32::MAX);
        let [ids, positions, ends] = &mut self.host.tokens;
        let [ids, positions, ends] = [ids, positions, ends].map(|host| host.extract_tensor_mut().1);
        let places = ids.iter_mut().zip(positions).zip(ends);
        for (row, ((id, position), end)) in rows.iter().zip(places) {
            *id = row.tokens.first().map_or(0, |&token| i32::from(token));
            *position = int32(row.past);
            // ONNX Runtime's convention: tokens after the run, less one.
            *end = int32(row.past);
        }
        let (outcome, ran) = RunSpan::of(|| {
            copies.upload(self.host.tokens.iter_mut().zip(&mut self.device.tokens))?;
            session
                .run_binding_with_options(&self.binding, &self.options)
                .map_err(runtime)?;
            copies.download(&mut self.device.logits, &mut self.host.logits)
        });
        *span = Some(ran);
        outcome?;
        Ok(self.host.logits.extract_tensor().1)
    }
}

impl SequenceEngine {
    /// Makes the step of all slots.
    pub(super) fn step(&mut self, copies: &mut EngineCopies) -> Result<Step, EngineError> {
        let n_rows = self.n_buffers();
        let mut binding = self.cache.bind(&self.session, 0, n_rows)?;
        let allocator = self.cache.allocator(&self.session)?;
        let new = |allocator: &Allocator| Placed::new(allocator, n_rows, self.n_colors);
        let host = new(&Allocator::default()).map_err(runtime)?;
        let mut device = new(&allocator).map_err(runtime)?;
        copies.reserve(&host.tokens.each_ref(), &host.logits);
        for (name, tensor) in STEP_INPUTS.into_iter().zip(&device.tokens) {
            binding.bind_input(name, tensor).map_err(runtime)?;
        }
        binding
            .bind_output("logits", &mut device.logits)
            .map_err(runtime)?;
        // This input is read on the host, so a captured step always has the
        // value of its capture: the largest possible number, which only affects
        // how the work is split.
        let scalar: [usize; 0] = [];
        let most = i32::try_from(self.positions).unwrap_or(i32::MAX);
        let most = Tensor::from_array((scalar, vec![most])).map_err(runtime)?;
        binding
            .bind_input("total_sequence_length", &most)
            .map_err(runtime)?;
        let mut options = RunOptions::new().map_err(runtime)?;
        if self.captures {
            options.set(GRAPH_ID, STEP_GRAPH).map_err(runtime)?;
        }
        Ok(Step {
            n_rows,
            binding,
            host,
            device,
            options,
        })
    }
}
