//! Runs batches: the [`Engine`] trait, its thread, and what implements it.
//!
//! The engine lives on one named thread that owns it, because ONNX Runtime's
//! `Session::run` takes `&mut self`: a lock around it would only move the
//! queue to where nothing can see it. The thread asks for a batch when it is
//! free (a [`Slot`] sent to the batcher) and never before, so a batch is
//! formed at the last moment. Nothing here awaits.

pub mod attention;
pub mod fake;
pub mod onnx;
pub mod runtime;

use std::panic::AssertUnwindSafe;
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender};
use tokio::sync::watch;

use crate::error::{Error, Stage};
use crate::job::{Answer, Job, Norm, Want};
use crate::metrics::Metrics;

/// A computation that the model offers. Jobs of one batch share a graph.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Graph {
    /// Tokens to pooled features of every layer up to the feature layer.
    Features(Norm),
    /// Tokens to last hidden states.
    Hidden,
    /// Tokens to scores of the classification head.
    Logits,
}

impl Graph {
    pub const ALL: [Self; 4] = [
        Self::Features(Norm::PreAttnRms),
        Self::Features(Norm::None),
        Self::Hidden,
        Self::Logits,
    ];

    /// The graph that computes what is wanted.
    #[must_use]
    pub fn of(want: Want) -> Self {
        match want {
            Want::Features { norm, .. } => Self::Features(norm),
            Want::Mean | Want::Last | Want::States => Self::Hidden,
            Want::Logits => Self::Logits,
        }
    }

    /// The graph's label in metrics and logs.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::Features(Norm::PreAttnRms) => "features",
            Self::Features(Norm::None) => "features_raw",
            Self::Hidden => "hidden",
            Self::Logits => "logits",
        }
    }
}

/// One row of a batch.
#[derive(Debug, Clone, Copy)]
pub struct Row<'a> {
    /// As many token ids as the model has positions.
    pub tokens: &'a [u16],
    pub want: Want,
}

/// What an engine tells of itself once it is loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// "cpu" or "cuda".
    pub provider: &'static str,
    /// Version of the runtime underneath.
    pub runtime_version: String,
    /// Width of features and hidden states; 0 for classification alone.
    pub dimension: usize,
    /// Rows of the classification head; 0 without [`Graph::Logits`].
    pub n_classes: usize,
}

/// Computes batches. Built and used on the engine thread alone.
pub trait Engine {
    fn facts(&self) -> &Facts;

    /// Runs one batch and returns the wanted numbers of each row, in order.
    ///
    /// # Errors
    ///
    /// When the run failed; then no row has an answer.
    fn run(&mut self, graph: Graph, rows: &[Row<'_>]) -> Result<Vec<Vec<f32>>, EngineError>;
}

/// Why an engine could not be loaded, or a batch not run.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The runtime's library is missing or cannot be used.
    #[error("{0}")]
    Library(String),
    /// The execution provider that was asked for cannot be had.
    #[error("{0}")]
    Provider(String),
    /// A graph is not one that this worker can serve.
    #[error("{file}: {reason}")]
    Graph { file: String, reason: String },
    /// The engine could not be loaded, for a reason that says it all.
    #[error("{0}")]
    NotLoaded(String),
    /// The runtime failed.
    #[error("onnx runtime: {0}")]
    Runtime(String),
    /// The run's numbers are not what the graph promised.
    #[error("the model returned {got}, not {expected}")]
    Output { got: String, expected: String },
    /// Numbers of a run are not finite.
    #[error("the model returned a value that is not finite")]
    NotFinite,
    /// The engine panicked.
    #[error("the engine panicked: {0}")]
    Panicked(String),
}

/// Makes the engine, on the engine's own thread.
pub type EngineFactory = Box<dyn FnOnce() -> Result<Box<dyn Engine>, EngineError> + Send>;

/// A batch on its way to the engine. Never empty.
pub type Batch = Vec<Job<Box<[u16]>>>;

/// The engine's word that it is free for one batch.
#[derive(Debug)]
pub struct Slot;

/// Where the engine is in its life.
#[derive(Debug, Clone)]
pub enum State {
    /// Loading and warming up.
    Loading,
    /// Serving.
    Ready(Facts),
    /// Ended in good order after the last batch.
    Stopped,
    /// Never started, or ended by a panic; the process should end too.
    Failed(String),
}

/// The life of the engine thread: load, then ask for batches until the
/// batcher hangs up.
pub(crate) fn run(
    factory: EngineFactory,
    slots: &Sender<Slot>,
    batches: &Receiver<(Graph, Batch)>,
    state: &watch::Sender<State>,
    metrics: &Metrics,
) {
    let loaded = std::panic::catch_unwind(AssertUnwindSafe(factory))
        .unwrap_or_else(|panic| Err(EngineError::Panicked(panic_text(&*panic))));
    let mut engine = match loaded {
        Ok(engine) => engine,
        Err(error) => {
            state.send_replace(State::Failed(error.to_string()));
            return;
        }
    };
    state.send_replace(State::Ready(engine.facts().clone()));
    while slots.send(Slot).is_ok() {
        let Ok((graph, batch)) = batches.recv() else {
            break;
        };
        if let Err(error @ EngineError::Panicked(_)) = serve(&mut *engine, graph, batch, metrics) {
            // What the engine's memory holds after a panic is unknown.
            state.send_replace(State::Failed(error.to_string()));
            return;
        }
    }
    // Unless another stage has failed meanwhile.
    state.send_if_modified(|state| {
        let ready = matches!(state, State::Ready(_));
        if ready {
            *state = State::Stopped;
        }
        ready
    });
}

/// Runs one batch and answers its jobs.
fn serve(
    engine: &mut dyn Engine,
    graph: Graph,
    batch: Batch,
    metrics: &Metrics,
) -> Result<(), EngineError> {
    let rows: Vec<Row<'_>> = batch
        .iter()
        .filter_map(|job| match job.work {
            crate::job::Work::Infer { want, .. } => Some(Row {
                tokens: &job.payload,
                want,
            }),
            crate::job::Work::Tokenize => None,
        })
        .collect();
    let started = Instant::now();
    let outcome = std::panic::catch_unwind(AssertUnwindSafe(|| engine.run(graph, &rows)))
        .unwrap_or_else(|panic| Err(EngineError::Panicked(panic_text(&*panic))))
        .and_then(|values| {
            if values.len() == rows.len() {
                Ok(values)
            } else {
                Err(EngineError::Output {
                    got: format!("{} rows", values.len()),
                    expected: format!("{}", rows.len()),
                })
            }
        });
    metrics.inference(graph, started.elapsed());
    match outcome {
        Ok(values) => {
            let now = Instant::now();
            for (job, values) in batch.into_iter().zip(values) {
                let late = job.ticket.deadline.is_some_and(|deadline| deadline <= now);
                job.ticket.finish(if late {
                    Err(Error::DeadlineExceeded {
                        stage: Stage::Engine,
                    })
                } else if values.iter().all(|value| value.is_finite()) {
                    Ok(Answer::Values(values))
                } else {
                    Err(EngineError::NotFinite.into())
                });
            }
            Ok(())
        }
        Err(error) => {
            tracing::error!(graph = graph.label(), batch_size = batch.len(), %error, "inference failed");
            let shared = Error::from(match &error {
                EngineError::Panicked(text) => EngineError::Panicked(text.clone()),
                other => EngineError::Runtime(other.to_string()),
            });
            for job in batch {
                job.ticket
                    .span
                    .in_scope(|| tracing::warn!("an image of this call was in it"));
                job.ticket.finish(Err(shared.clone()));
            }
            Err(error)
        }
    }
}

/// What a panic said, if it said it in words.
pub(crate) fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    panic
        .downcast_ref::<&str>()
        .map(ToString::to_string)
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "no message".to_owned())
}
