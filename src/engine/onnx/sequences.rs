//! Generation of sequences in ONNX Runtime: the graph `generate` and its
//! key/value cache.
//!
//! The keys of a layer are one buffer of `(slots, heads, positions, elements)`
//! that is allocated once, and so are its values. A run is given the rows of
//! some slots as input and as output, so it writes new keys and values in place
//! and copies nothing. These views are bound once for each range of slots that
//! is ever run; only a few integers change from step to step.
//!
//! On a GPU a step always runs with all slots, whose inputs and outputs are in
//! the device's memory, so that it can be captured as one CUDA graph. A step of
//! few slots would take less time: see benches/GPU.md.

mod cache;
mod step;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use ort::memory::{AllocationDevice, AllocatorType, MemoryInfo, MemoryType};
use ort::session::{IoBinding, RunOptions, Session};
use ort::value::Tensor;

use self::cache::{KvCache, KvLayout};
use self::step::Step;
use super::copies::EngineCopies;
use super::whole_images::{GRAPH_ID, NO_GRAPH};
use crate::engine::{RunSpan, SequenceFacts, SlotFeed, SlotFeedRow, WarmRun};
use crate::kernels::attention::SharedPrefix;
use crate::model::graph::{Graph, PREFIXES};
use crate::model::precision::Provider;
use crate::runtime::error::{EngineError, runtime};
use crate::runtime::load::Loader;
use crate::runtime::{GpuAttention, Residence, Runtime, placement};

/// Number of tokens of a primer that are fed in one run on a CPU. Such a run
/// takes about as long as a few steps of imagegpt-small, so that it hardly
/// delays the images that are being generated.
const CHUNK_CPU: usize = 64;
/// Smallest number of rows of a step of ONNX Runtime's operators on a CPU, if
/// there are that many slots: kernels for a single row add in another order than
/// those for several rows. The worker's own operator does not.
const ROWS_MIN_CPU: usize = 2;
/// Number of tokens of a primer that are fed in one run on a GPU, which fewer
/// tokens would not fill.
const CHUNK_CUDA: usize = 256;

/// Settings of generation.
#[derive(Debug, Clone, Copy)]
pub(super) struct SequenceOptions {
    /// Number of slots; fewer are made if `bytes_max` does not suffice.
    pub(super) n_slots: usize,
    /// Largest size of all keys and values, in bytes.
    pub(super) bytes_max: usize,
    pub(super) positions: usize,
    pub(super) n_colors: usize,
    pub(super) attention: GpuAttention,
}

/// Engine of generation, with a key/value cache that is updated in place.
pub(super) struct SequenceEngine {
    pub(super) facts: SequenceFacts,
    /// Bindings by first slot and number of slots; dropped before the cache, to
    /// which they refer.
    bound: BTreeMap<(usize, usize), IoBinding>,
    /// Step of all slots, if steps always run at that size.
    step: Option<Step>,
    /// Options of runs that are not captured.
    uncaptured: RunOptions,
    captures: bool,
    session: Session,
    cache: KvCache,
    /// True if steps always run with all slots, from memory of the device, as on
    /// a GPU.
    has_one_size: bool,
    positions: usize,
    n_colors: usize,
    /// True if there is an unused slot that is run beside the only real slot,
    /// since a product of one row may add in another order than a product of
    /// several rows.
    has_scratch: bool,
}

impl SequenceEngine {
    /// Opens the graph. [`SequenceEngine::prepare`] comes next.
    pub(super) fn open(
        runtime_: &Runtime,
        loader: &mut Loader,
        path: &Path,
        options: SequenceOptions,
    ) -> Result<Self, EngineError> {
        let file = path.display().to_string();
        let refuse = |reason: String| EngineError::Graph {
            file: file.clone(),
            reason,
        };
        let is_cuda = runtime_.provider == Provider::Cuda;
        // A step reads every weight for a few rows: packed weights are twice as
        // fast, and give each row the same bits whatever the other rows are.
        let packed = Runtime {
            residence: Residence::Packed,
            attention: options.attention,
            ..runtime_.clone()
        };
        let session = loader.session(&packed, path)?;
        let placement = placement::placement(&session).map_err(runtime)?;
        placement::check(&placement, runtime_.provider, true).map_err(refuse)?;
        let layout = KvLayout::of(&session, options.positions)
            .ok_or_else(|| refuse("the inputs of its key/value cache are not known".to_owned()))?;
        let slot_bytes = layout.slot_bytes().ok_or_else(|| {
            let slot = layout.slot;
            refuse(format!(
                "its key/value cache of {slot:?} per layer and image is too large for memory"
            ))
        })?;
        let n_slots = options.n_slots.min(options.bytes_max / slot_bytes.max(1));
        if n_slots == 0 {
            return Err(EngineError::NotLoaded(format!(
                "the key/value cache of one generated image takes {slot_bytes} bytes; the limit is \
                 {} (--generate-cache-bytes); raise it, or turn generation off with \
                 --generate-slots 0",
                options.bytes_max
            )));
        }
        let mut uncaptured = RunOptions::new().map_err(runtime)?;
        if runtime_.cuda_graphs {
            uncaptured.set(GRAPH_ID, NO_GRAPH).map_err(runtime)?;
        }
        // Tests use the path of captured runs on a CPU.
        let has_one_size = is_cuda || runtime_.cuda_graphs;
        // Only the worker's own operator has this input.
        let shares_prefixes = (session.inputs().iter()).any(|input| input.name() == PREFIXES);
        let rows_min = match (has_one_size, shares_prefixes) {
            (true, _) => n_slots,
            (false, true) => 1,
            (false, false) => ROWS_MIN_CPU,
        };
        let has_scratch = n_slots == 1 && !shares_prefixes;
        let n_buffers = n_slots + usize::from(has_scratch);
        Ok(Self {
            facts: SequenceFacts {
                n_slots,
                slot_bytes,
                chunk: if is_cuda { CHUNK_CUDA } else { CHUNK_CPU },
                chunks_are_powers: has_one_size,
                rows_min,
                shares_prefixes,
            },
            bound: BTreeMap::new(),
            step: None,
            uncaptured,
            captures: runtime_.cuda_graphs,
            session,
            cache: KvCache::new(runtime_, layout, n_buffers, has_one_size)?,
            has_one_size,
            positions: options.positions,
            n_colors: options.n_colors,
            has_scratch,
        })
    }

    /// Allocates the key/value cache and binds the step of all slots.
    pub(super) fn prepare(&mut self, copies: &mut EngineCopies) -> Result<(), EngineError> {
        self.cache.allocate(&self.session)?;
        self.fill_slots(0, self.n_buffers(), 0.0)?;
        if self.has_one_size {
            self.step = Some(self.step(copies)?);
        }
        Ok(())
    }

    /// Returns the number of slots that have memory, the scratch slot included.
    fn n_buffers(&self) -> usize {
        self.facts.n_slots + usize::from(self.has_scratch)
    }

    /// Sets the keys and values of `n` slots from `first` on to a number.
    pub(super) fn fill_slots(
        &mut self,
        first: usize,
        n: usize,
        number: f32,
    ) -> Result<(), EngineError> {
        self.cache.fill(&self.session, first, n, number)
    }

    /// Copies the first `n` positions of a slot, rounded up to whole blocks;
    /// returns false if the memory is not the host's.
    pub(super) fn copy_slot(&mut self, from: usize, to: usize, n: usize) -> bool {
        self.cache.copy_slot(from, to, n)
    }

    /// Runs a primer and a step of each size, before any caller waits for them.
    pub(super) fn warm_up(
        &mut self,
        copies: &mut EngineCopies,
    ) -> Result<Vec<WarmRun>, EngineError> {
        let mut warm = Vec::new();
        let mut logits = Vec::new();
        self.warm_up_primers(copies, &mut logits)?;
        let start = u16::try_from(self.n_colors).unwrap_or(u16::MAX);
        for size in self.facts.sizes().iter() {
            let row = SlotFeedRow {
                tokens: &[start],
                past: 0,
            };
            let rows = vec![row; size];
            let feed = SlotFeed {
                first_slot: 0,
                rows: &rows,
                prefixes: &[],
            };
            let mut elapsed = Duration::ZERO;
            // The first run of a size allocates.
            for _ in 0..2 {
                let started = Instant::now();
                self.feed(&feed, copies, &mut logits, &mut None)?;
                elapsed = started.elapsed();
            }
            warm.push(WarmRun {
                graph: Graph::Generate,
                bucket: size,
                elapsed,
            });
        }
        self.cache.use_huge_pages();
        Ok(warm)
    }

    /// Runs primers of all lengths, first and later pieces: on a GPU, kernels
    /// are chosen and built for each length.
    fn warm_up_primers(
        &mut self,
        copies: &mut EngineCopies,
        logits: &mut Vec<f32>,
    ) -> Result<(), EngineError> {
        let (facts, positions) = (self.facts, self.positions);
        for length in facts.pieces(positions) {
            let tokens: Vec<u16> = vec![0; length];
            let later = facts.chunks_are_powers.then_some(facts.chunk);
            let pasts = std::iter::once(0).chain(later);
            for past in pasts.filter(|past| past + length <= positions) {
                let piece = SlotFeedRow {
                    tokens: &tokens,
                    past,
                };
                let feed = SlotFeed {
                    first_slot: 0,
                    rows: &[piece],
                    prefixes: &[],
                };
                self.feed(&feed, copies, logits, &mut None)?;
            }
        }
        Ok(())
    }

    pub(super) fn feed(
        &mut self,
        feed: &SlotFeed<'_>,
        copies: &mut EngineCopies,
        logits: &mut Vec<f32>,
        span: &mut Option<RunSpan>,
    ) -> Result<(), EngineError> {
        let beside;
        let mut rows = feed.rows;
        if self.has_scratch
            && let [row] = rows
            && row.tokens.len() == 1
        {
            let nobody = SlotFeedRow { past: 0, ..*row };
            beside = [*row, nobody];
            rows = &beside;
        }
        if let Some(step) = &mut self.step
            && (feed.first_slot, rows.len()) == (0, step.n_rows)
            && rows.iter().all(|row| row.tokens.len() == 1)
        {
            let values = step.run(&mut self.session, rows, copies, span)?;
            logits.clear();
            logits.extend_from_slice(&values[..feed.rows.len() * self.n_colors]);
            return Ok(());
        }
        let range = (feed.first_slot, rows.len());
        if !self.bound.contains_key(&range) {
            let binding = self.bind(feed.first_slot, rows.len())?;
            self.bound.insert(range, binding);
        }
        let binding = self
            .bound
            .get_mut(&range)
            .ok_or_else(|| EngineError::Runtime("a binding was lost".to_owned()))?;
        bind_tokens(binding, rows).map_err(runtime)?;
        if self.facts.shares_prefixes {
            bind_prefixes(binding, rows.len(), feed.prefixes).map_err(runtime)?;
        }
        let session = &mut self.session;
        let options = &self.uncaptured;
        let (outputs, ran) = RunSpan::of(|| session.run_binding_with_options(binding, options));
        *span = Some(ran);
        let outputs = outputs.map_err(runtime)?;
        let output = outputs
            .get("logits")
            .ok_or_else(|| EngineError::Runtime("the run returned no logits".to_owned()))?;
        let (_, values) = output.try_extract_tensor::<f32>().map_err(runtime)?;
        if values.len() != rows.len() * self.n_colors {
            return Err(EngineError::Output {
                got: format!("{} logits", values.len()),
                expected: format!("{} x {}", rows.len(), self.n_colors),
            });
        }
        logits.clear();
        logits.extend_from_slice(&values[..feed.rows.len() * self.n_colors]);
        Ok(())
    }

    /// Binds the keys and values of `n` slots from `first` on, and the logits.
    fn bind(&mut self, first: usize, n: usize) -> Result<IoBinding, EngineError> {
        let mut binding = self.cache.bind(&self.session, first, n)?;
        let host = MemoryInfo::new(
            AllocationDevice::CPU,
            0,
            AllocatorType::Device,
            MemoryType::CPUOutput,
        )
        .map_err(runtime)?;
        binding
            .bind_output_to_device("logits", &host)
            .map_err(runtime)?;
        Ok(binding)
    }
}

/// Binds the inputs that change from run to run.
fn bind_tokens(binding: &mut IoBinding, rows: &[SlotFeedRow<'_>]) -> ort::Result<()> {
    let int32 = |size: usize| i32::try_from(size).unwrap_or(i32::MAX);
    let n_rows = rows.len();
    let length = rows.iter().map(|row| row.tokens.len()).max().unwrap_or(0);
    let mut ids = Vec::with_capacity(n_rows * length);
    let mut positions = Vec::with_capacity(n_rows * length);
    let mut ends = Vec::with_capacity(n_rows);
    for row in rows {
        ids.extend(row.tokens.iter().map(|&token| i32::from(token)));
        positions.extend((row.past..row.past + row.tokens.len()).map(int32));
        // ONNX Runtime's convention: tokens after the run, less one.
        ends.push(int32(row.past + row.tokens.len() - 1));
    }
    let most = ends.iter().max().map_or(1, |end| end + 1);
    let scalar: [usize; 0] = [];
    binding.bind_input("input_ids", &Tensor::from_array(([n_rows, length], ids))?)?;
    binding.bind_input(
        "position_ids",
        &Tensor::from_array(([n_rows, length], positions))?,
    )?;
    binding.bind_input("seqlens_k", &Tensor::from_array(([n_rows], ends))?)?;
    binding.bind_input(
        "total_sequence_length",
        &Tensor::from_array((scalar, vec![most]))?,
    )
}

/// Binds the shared prefixes of `n_rows` rows.
fn bind_prefixes(
    binding: &mut IoBinding,
    n_rows: usize,
    prefixes: &[SharedPrefix],
) -> ort::Result<()> {
    let int32 = |size: usize| i32::try_from(size).unwrap_or(i32::MAX);
    let prefix = |row| prefixes.get(row).copied().unwrap_or_default();
    let pairs = (0..n_rows).map(prefix);
    let pairs: Vec<i32> = pairs
        .flat_map(|SharedPrefix { of, len }| [int32(of), int32(len)])
        .collect();
    binding.bind_input(PREFIXES, &Tensor::from_array(([n_rows, 2], pairs))?)
}

#[cfg(test)]
mod tests;
