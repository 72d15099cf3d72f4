//! Graphs over whole images, from tokens to features, states or scores.
//!
//! The inputs and outputs of each batch size are allocated and bound once; only
//! the tokens change from run to run. With CUDA graphs they are in the device's
//! memory, because a captured run always uses the addresses of its capture.
//!
//! On the host they are in ordinary memory, since ONNX Runtime 1.31 refuses an
//! output that is bound to pinned memory (it tries to copy it onto itself). Of a
//! run of 19 ms, the upload of 64 images takes 0.04 ms and the download of their
//! means 0.3 ms. ONNX Runtime's copies also take a lock that all devices share;
//! those over the driver do not (`--gpu-copies`).

mod bound;
mod inputs;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use half::f16;
use ndarray::{CowArray, IxDyn};
use ort::memory::Allocator;
use ort::session::{RunOptions, Session, SessionInputValue};
use ort::value::{Outlet, TensorElementType, TensorValueTypeMarker, Value};

use self::bound::{Bound, Memory};
use self::inputs::{Input, Role, input};
use super::answers::answers;
use super::copies::EngineCopies;
use crate::engine::{BatchRow, GraphRun, RunSpan};
use crate::model::graph::Graph;
use crate::runtime::error::{EngineError, runtime};
use crate::runtime::load::Loader;
use crate::runtime::{Runtime, placement};

/// Key of the run option with the id of the captured graph.
pub(super) const GRAPH_ID: &str = "gpu_graph_id";
/// Id of runs that are never captured.
pub(super) const NO_GRAPH: &str = "-1";

/// Graph over whole images, with buffers that are bound once per size.
pub(super) struct WholeGraph {
    pub(super) file: String,
    /// Bound buffers by batch size; dropped before the session, to which they
    /// refer.
    bound: BTreeMap<usize, Bound>,
    session: Session,
    inputs: Vec<Input>,
    output: String,
    /// Type of the output's numbers: float32 or float16.
    numbers: TensorElementType,
    memory: Memory,
    /// Run options by batch size, which are made once like the buffers.
    options: BTreeMap<usize, Arc<RunOptions>>,
    /// Shape of one row of the output, known after the first run.
    row: Option<Vec<usize>>,
    captures: bool,
}

/// Rows of a run and its batch size.
#[derive(Clone, Copy)]
pub(super) struct WholeBatch<'a> {
    pub(super) rows: &'a [BatchRow<'a>],
    pub(super) size: usize,
    /// Number of tokens per row.
    pub(super) positions: usize,
    /// Start token to put in front of each row, if the last token is only a
    /// target.
    pub(super) start: Option<u16>,
}

impl WholeGraph {
    pub(super) fn open(
        runtime_: &Runtime,
        loader: &mut Loader,
        graph: Graph,
        path: &Path,
        is_compiled: bool,
    ) -> Result<Self, EngineError> {
        let file = path.display().to_string();
        let refuse = |reason: String| EngineError::Graph {
            file: file.clone(),
            reason,
        };
        let session = loader.session(runtime_, path)?;
        let placement = placement::placement(&session).map_err(runtime)?;
        placement::check(&placement, runtime_.provider, is_compiled).map_err(refuse)?;
        let inputs: Result<Vec<Input>, String> = session
            .inputs()
            .iter()
            .map(|outlet| input(outlet, graph))
            .collect();
        let inputs = inputs.map_err(refuse)?;
        if !inputs.iter().any(|input| input.role == Role::InputIds) {
            return Err(refuse("has no input \"input_ids\"".to_owned()));
        }
        let (output, numbers) = output(&session, graph).map_err(refuse)?;
        Ok(Self {
            file,
            bound: BTreeMap::new(),
            session,
            inputs,
            output,
            numbers,
            memory: Memory {
                provider: runtime_.provider,
                device_id: runtime_.device_id,
            },
            options: BTreeMap::new(),
            row: None,
            captures: runtime_.cuda_graphs,
        })
    }

    /// True if runs are captured, all but the first.
    pub(super) fn captures(&self) -> bool {
        self.captures
    }

    /// Returns the options of the next run of `size` images, without a stop
    /// request of an earlier run.
    pub(super) fn options(&mut self, size: usize) -> ort::Result<Arc<RunOptions>> {
        if let Some(options) = self.options.get(&size) {
            options.unterminate()?;
            return Ok(Arc::clone(options));
        }
        let mut options = RunOptions::new()?;
        if self.captures {
            let id = match self.row {
                Some(_) => size.to_string(),
                None => NO_GRAPH.to_owned(),
            };
            options.set(GRAPH_ID, id)?;
        }
        let options = Arc::new(options);
        // The first run is not captured, so its options are not kept.
        if self.row.is_some() {
            self.options.insert(size, Arc::clone(&options));
        }
        Ok(options)
    }

    /// Runs a batch and returns the numbers that its rows want.
    pub(super) fn run(
        &mut self,
        run: &GraphRun<'_>,
        batch: WholeBatch<'_>,
        options: &RunOptions,
        copies: &mut EngineCopies,
        span: &mut Option<RunSpan>,
    ) -> Result<Vec<Vec<f32>>, EngineError> {
        // A graph need not declare the shape of its output. The first run shows
        // the shape, and then memory can be allocated.
        let Some(row) = &self.row else {
            *span = None;
            return self.first_run(run, batch, options);
        };
        if !self.bound.contains_key(&batch.size) {
            let bound = Bound::new(self, row, batch, copies)?;
            self.bound.insert(batch.size, bound);
        }
        let bound = self
            .bound
            .get_mut(&batch.size)
            .ok_or_else(|| EngineError::Runtime("a binding was lost".to_owned()))?;
        bound.feed(&self.inputs, batch, copies)?;
        let session = &mut self.session;
        let (outcome, ran) = RunSpan::of(|| {
            let outcome = session.run_binding_with_options(&bound.binding, options);
            outcome.map(drop)
        });
        *span = Some(ran);
        outcome.map_err(runtime)?;
        let output = floats(bound.output(copies)?)?;
        answers(run, batch.positions, &output.view())
    }

    fn first_run(
        &mut self,
        run: &GraphRun<'_>,
        batch: WholeBatch<'_>,
        options: &RunOptions,
    ) -> Result<Vec<Vec<f32>>, EngineError> {
        let feeds = self.feeds(batch)?;
        let outputs = self
            .session
            .run_with_options(feeds, options)
            .map_err(runtime)?;
        let output = outputs
            .get(&self.output)
            .ok_or_else(|| EngineError::Runtime("the run returned no output".to_owned()))?;
        let output = floats(output)?;
        let row = output.shape().iter().skip(1).copied().collect();
        let answers = answers(run, batch.positions, &output.view())?;
        self.row = Some(row);
        Ok(answers)
    }

    /// Returns true if a batch can be run without an error.
    pub(super) fn takes(&mut self, batch: WholeBatch<'_>) -> Result<bool, EngineError> {
        let feeds = self.feeds(batch)?;
        Ok(self.session.run(feeds).is_ok())
    }

    fn feeds(
        &self,
        batch: WholeBatch<'_>,
    ) -> Result<Vec<(String, SessionInputValue<'static>)>, EngineError> {
        let allocator = Allocator::default();
        let feeds = self.inputs.iter().map(|input| {
            let mut tensor = input.tensor(&allocator, batch)?;
            input.fill(&mut tensor, batch)?;
            Ok((input.name.clone(), tensor.into()))
        });
        feeds.collect()
    }
}

/// Returns the numbers of an output as float32.
fn floats<T: TensorValueTypeMarker + ?Sized>(
    output: &Value<T>,
) -> Result<CowArray<'_, f32, IxDyn>, EngineError> {
    if output.dtype().tensor_type() == Some(TensorElementType::Float16) {
        let halves = output.try_extract_array::<f16>().map_err(runtime)?;
        return Ok(halves.mapv(f16::to_f32).into());
    }
    let floats = output.try_extract_array::<f32>().map_err(runtime)?;
    Ok(floats.into())
}

/// Returns the name of a graph's output and the type of its numbers, after
/// checks of both.
fn output(session: &Session, graph: Graph) -> Result<(String, TensorElementType), String> {
    let wanted = match graph {
        Graph::Features(_) => "features",
        Graph::Hidden => "last_hidden_state",
        Graph::Logits | Graph::Generate => "logits",
        Graph::Score => "nll",
    };
    let mut outputs = session.outputs().iter();
    let Some(output) = outputs.find(|outlet| outlet.name() == wanted) else {
        let names: Vec<&str> = session.outputs().iter().map(Outlet::name).collect();
        return Err(format!(
            "has no output {wanted:?}; it has {}",
            names.join(", ")
        ));
    };
    match output.dtype().tensor_type() {
        Some(numbers @ (TensorElementType::Float32 | TensorElementType::Float16)) => {
            Ok((wanted.to_owned(), numbers))
        }
        _ => Err(format!(
            "output {wanted:?} is {:?}; it must be a float32 or float16 tensor",
            output.dtype()
        )),
    }
}

#[cfg(test)]
mod tests;
