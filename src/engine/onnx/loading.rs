//! Loading of an engine: its graphs one by one, each warmed up at once, so that a
//! graph that cannot be served is told before there are callers.

use std::path::Path;
use std::time::{Duration, Instant};

use super::sequences::{self, SequenceEngine};
use super::whole_images::{WholeBatch, WholeGraph};
use super::{Canary, OnnxEngine, OnnxOptions, no_graph};
use crate::engine::{BatchRow, Engine as _, Fallback, FallbackKind, GraphRun, RunStop, WarmRun};
use crate::model::graph::{Graph, Layers, Want};
use crate::model::precision::Provider;
use crate::model::settings::check_classes;
use crate::runtime::Runtime;
use crate::runtime::error::EngineError;
use crate::runtime::load::Loader;

/// Duration of a warm-up run below which the run is repeated.
const WARM_TWICE: Duration = Duration::from_millis(500);

impl OnnxEngine {
    /// Loads the graphs that are served, one after the other.
    pub(super) fn load_all(
        &mut self,
        runtime: &Runtime,
        options: &OnnxOptions,
    ) -> Result<(), EngineError> {
        let served = |graph| graph != Graph::Generate || options.generate_slots > 0;
        let graphs = options.graphs.iter().filter(|(graph, _)| served(**graph));
        // Only compiled graphs on a CPU compute from shared weights in place.
        let shares =
            options.compiled_for == Some(Provider::Cpu) && runtime.provider == Provider::Cpu;
        let sharing = graphs.clone().map(|(_, path)| path).filter(|_| shares);
        let mut loader = Loader::new(options.files.clone(), sharing)?;
        for (&graph, path) in graphs {
            let started = Instant::now();
            if graph == Graph::Generate {
                self.load_sequences(runtime, &mut loader, path, options)?;
            } else {
                self.load_graph(runtime, &mut loader, graph, path, options)?;
            }
            let seconds = started.elapsed().as_secs_f64();
            tracing::debug!(graph = graph.label(), seconds, "graph loaded and warmed up");
        }
        loader.finish();
        self.note_copies();
        Ok(())
    }

    /// Notes if copies that were asked for are not used.
    pub(super) fn note_copies(&mut self) {
        if let Some(refusal) = self.copies.refusal() {
            self.facts.fallbacks.push(Fallback {
                kind: FallbackKind::GpuCopies,
                reason: refusal.to_owned(),
            });
        }
    }

    /// Loads a graph and warms it up; if it cannot be captured as a CUDA graph,
    /// it is loaded without.
    fn load_graph(
        &mut self,
        runtime: &Runtime,
        loader: &mut Loader,
        graph: Graph,
        path: &Path,
        options: &OnnxOptions,
    ) -> Result<(), EngineError> {
        let is_compiled = options.compiled_for.is_some();
        let n_warm = self.warm.len();
        let load = |cuda_graphs| {
            // Drops the results of a failed first attempt, above all its
            // memory.
            self.warm.truncate(n_warm);
            self.graphs.remove(&graph);
            let runtime = Runtime {
                cuda_graphs,
                ..runtime.clone()
            };
            let whole = WholeGraph::open(&runtime, loader, graph, path, is_compiled)?;
            self.graphs.insert(graph, whole);
            self.warm_up(graph, options)
        };
        if let Some(error) = captured_or_not(runtime.cuda_graphs, load)? {
            self.not_captured(graph, &error);
        }
        Ok(())
    }

    fn not_captured(&mut self, graph: Graph, error: &EngineError) {
        let graph = graph.label();
        tracing::warn!(graph, %error, "cannot use CUDA graphs; launching kernels one by one");
        self.facts.fallbacks.push(Fallback {
            kind: FallbackKind::CudaGraphs,
            reason: format!("graph {graph}: {error}"),
        });
    }

    fn load_sequences(
        &mut self,
        runtime: &Runtime,
        loader: &mut Loader,
        path: &Path,
        options: &OnnxOptions,
    ) -> Result<(), EngineError> {
        let sizes = sequences::SequenceOptions {
            n_slots: options.generate_slots,
            bytes_max: options.generate_bytes_max,
            positions: options.positions,
            n_colors: options.n_colors,
            attention: options.generate_attention,
        };
        let load = |cuda_graphs| {
            self.sequences = None;
            let runtime = Runtime {
                cuda_graphs,
                ..runtime.clone()
            };
            let sequences = SequenceEngine::open(&runtime, loader, path, sizes)?;
            // Owned by the engine before its device is used; see `leak_if_lost`.
            let sequences = self.sequences.insert(sequences);
            let warm = sequences
                .prepare(&mut self.copies)
                .and_then(|()| sequences.warm_up(&mut self.copies))
                .map_err(|error| self.failures.judge(error))?;
            self.facts.sequences = Some(sequences.facts);
            self.warm.extend(warm);
            Ok(())
        };
        if let Some(error) = captured_or_not(runtime.cuda_graphs, load)? {
            self.not_captured(Graph::Generate, &error);
        }
        Ok(())
    }

    /// Runs the graph with every token id, at every batch size that is warmed up
    /// (on a CPU the smallest alone), and learns the width of its output.
    fn warm_up(&mut self, graph: Graph, options: &OnnxOptions) -> Result<(), EngineError> {
        // The start token is never a target of `score`.
        let n_ids = options.n_colors + usize::from(graph != Graph::Score);
        let tokens: Vec<u16> = (0..options.positions)
            .map(|position| u16::try_from(position % n_ids).unwrap_or(0))
            .collect();
        let want = match graph {
            Graph::Features(norm) => Want::Features {
                layers: Layers::FIRST,
                norm,
            },
            Graph::Hidden => Want::Mean,
            Graph::Logits => Want::Logits,
            Graph::Score | Graph::Generate => Want::Nll,
        };
        let row = BatchRow {
            tokens: &tokens,
            want,
        };
        let answer = self.trial_runs(graph, options, row)?;
        let width = answer.len();
        if self.canary.is_none() {
            self.canary = Some(Canary {
                graph,
                bucket: options.buckets.smallest(),
                want,
                tokens: tokens.clone(),
                answer,
            });
        }
        if !options.sizes_are_given && self.facts.provider == "cpu" {
            self.check_sizes(graph, options)?;
        }
        self.take_width(graph, width, options)
            .map_err(|reason| self.refuse(graph, reason))
    }

    /// Runs a row at every batch size that is warmed up, and returns its last
    /// answer.
    fn trial_runs(
        &mut self,
        graph: Graph,
        options: &OnnxOptions,
        row: BatchRow<'_>,
    ) -> Result<Vec<f32>, EngineError> {
        let mut answer = Vec::new();
        // A GPU captures each size now. A CPU is ready sooner, and takes less
        // memory, if the larger sizes wait until images fill them.
        let n_sizes = if self.facts.sizes_untried {
            1
        } else {
            usize::MAX
        };
        let runs_twice = self.graphs.get(&graph).is_some_and(WholeGraph::captures);
        for bucket in options.buckets.iter().take(n_sizes) {
            let run = GraphRun {
                graph,
                bucket,
                rows: &[row],
            };
            let mut started = Instant::now();
            let first = self.run(&run, &RunStop::default());
            let values = match first {
                // The first run of a size allocates and tunes, so the second
                // run is measured, by which batch sizes are chosen. In a long
                // run the overhead is small, so that a second run is not worth
                // its time.
                //
                // The first run of a session on a GPU, which is always long, is
                // not captured; a run that was captured later, beside another
                // engine's capture, would spoil both.
                Ok(_) if runs_twice || started.elapsed() < WARM_TWICE => {
                    started = Instant::now();
                    self.run(&run, &RunStop::default())
                }
                first => first,
            }
            .map_err(|error| match error {
                // A lost device says nothing about the graph.
                EngineError::Device(_) => error,
                error => {
                    let last_id = options.n_colors - usize::from(graph == Graph::Score);
                    let reason = format!(
                        "a trial run of {bucket} images with every token id (0 to {last_id}) \
                         failed: the graph does not fit the palette or the positions, or there \
                         is not enough memory: {error}"
                    );
                    self.refuse(graph, reason)
                }
            })?;
            self.warm.push(WarmRun {
                graph,
                bucket,
                elapsed: started.elapsed(),
            });
            answer = values.into_iter().next().unwrap_or_default();
        }
        Ok(answer)
    }

    /// Error of a loaded graph that cannot be served.
    fn refuse(&self, graph: Graph, reason: String) -> EngineError {
        let loaded = self.graphs.get(&graph);
        EngineError::Graph {
            file: loaded.map_or_else(String::new, |loaded| loaded.file.clone()),
            reason,
        }
    }

    /// Notes the width of a graph's answers, or refuses one that does not fit
    /// the heads or the labels.
    fn take_width(
        &mut self,
        graph: Graph,
        width: usize,
        options: &OnnxOptions,
    ) -> Result<(), String> {
        match graph {
            Graph::Features(_) | Graph::Hidden => {
                let mut heads = options.head_widths.iter();
                if let Some((expected, head)) = heads.find(|(expected, _)| *expected != width) {
                    return Err(format!(
                        "features have {width} numbers, but the head {head} was trained on \
                         {expected} numbers"
                    ));
                }
                self.facts.dimension = width;
            }
            Graph::Logits => {
                check_classes(options.n_labels, width)?;
                self.facts.n_classes = width;
            }
            Graph::Score | Graph::Generate => {}
        }
        Ok(())
    }

    /// Refuses a graph that takes a token id beyond the start token, or a
    /// position beyond the last: then the palette or the size belongs to
    /// another model, and answers would look right but be wrong. A CPU fails
    /// for ids that the graph does not have; a GPU would not.
    fn check_sizes(&mut self, graph: Graph, options: &OnnxOptions) -> Result<(), EngineError> {
        let (positions, n_colors) = (self.positions, options.n_colors);
        let loaded = self.graphs.get_mut(&graph).ok_or_else(|| no_graph(graph))?;
        let beyond = u16::try_from(n_colors + 1).unwrap_or(u16::MAX);
        for (tokens, what) in [
            (
                vec![beyond; positions],
                format!("token id {beyond}, which the palette lacks"),
            ),
            (
                vec![0; positions + 1],
                format!("{} positions, more than the size has", positions + 1),
            ),
        ] {
            let row = BatchRow {
                tokens: &tokens,
                want: Want::Mean,
            };
            let batch = WholeBatch {
                rows: &[row],
                size: options.buckets.smallest(),
                positions: tokens.len(),
                start: None,
            };
            if loaded.takes(batch)? {
                return Err(EngineError::Graph {
                    file: loaded.file.clone(),
                    reason: format!(
                        "takes {what}, so preprocessor_config.json belongs to another model; if \
                         this is intended, put the model's config.json beside it"
                    ),
                });
            }
        }
        Ok(())
    }
}

/// Calls `load` with CUDA graphs if they are wanted, and without them if this
/// fails; returns the reason why runs cannot be captured.
pub(super) fn captured_or_not(
    wanted: bool,
    mut load: impl FnMut(bool) -> Result<(), EngineError>,
) -> Result<Option<EngineError>, EngineError> {
    match load(wanted) {
        // The error is about CUDA graphs only if loading works without them.
        Err(error) if wanted && !matches!(error, EngineError::Device(_)) => {
            load(false).map(|()| Some(error))
        }
        outcome => outcome.map(|()| None),
    }
}
