//! Preprocessing: threads that turn pictures into tokens.
//!
//! Preprocessing is plain CPU work, so it runs on its own named threads and not
//! on the async runtime. Images that are tokens already need no decoding; they
//! are only checked, on the thread on which they arrive. A job whose caller has
//! disconnected or whose deadline has passed is dropped before its image is
//! decoded, and also during decoding.

pub(crate) mod queue;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;

use self::queue::{PreprocessQueue, ThreadReach};
use crate::imaging::{DecodeBudget, ImageInput, ImageRequest, PreprocessError, Preprocessor};
use crate::model::graph::Context;
use crate::serve::batcher::PreparedWork;
use crate::serve::error::{RequestStage, StageError};
use crate::serve::job::{Answer, Job, RequestedWork};
use crate::serve::metrics::Metrics;
use crate::serve::sequence::Sequence;

/// Runs one preprocessing thread until the queue of pictures is closed.
pub(crate) fn run(preprocessing: &Preprocessing, pictures: &PreprocessQueue, reach: ThreadReach) {
    while let Some(job) = pictures.next(reach) {
        preprocessing.tokenize(job);
    }
}

/// Turns pictures into tokens and hands them on to the batcher, on the calling
/// thread.
#[derive(Debug, Clone)]
pub(crate) struct Preprocessing {
    pub(crate) preprocessor: Arc<Preprocessor>,
    /// Longest CPU time for decoding one picture: the last limit, after those
    /// that follow from a file's header.
    pub(crate) decode_cpu_time_max: Duration,
    pub(crate) batcher: Sender<PreparedWork>,
    pub(crate) metrics: Metrics,
}

impl Preprocessing {
    /// Turns a job's picture into tokens; answers the job or hands it on to the
    /// batcher.
    pub(crate) fn tokenize(&self, mut job: Job<ImageRequest>) {
        job.ticket.timeline.taken();
        let (preprocessor, metrics) = (&self.preprocessor, &self.metrics);
        if let Some(error) = job.ticket.dead(Instant::now(), RequestStage::Preprocess) {
            metrics.dead(&error);
            return job.ticket.finish(Err(error));
        }
        // Panics of decoders are caught where they happen; a panic from
        // anywhere else must not end the thread.
        let dead = || job.ticket.dead(Instant::now(), RequestStage::Preprocess);
        let abandoned = || dead().is_some();
        let budget = DecodeBudget::new(&abandoned, self.decode_cpu_time_max);
        let outcome = std::panic::catch_unwind(AssertUnwindSafe(|| {
            preprocessor.tokenize(&job.payload.input, job.payload.options, &budget)
        }));
        let outcome = match outcome {
            Ok(Err(PreprocessError::Abandoned)) => {
                // A caller who has disconnected stays so, and a deadline stays
                // passed.
                let error = dead().unwrap_or(StageError::Lost);
                metrics.dead(&error);
                return job.ticket.finish(Err(error));
            }
            Ok(outcome) => outcome.map_err(StageError::from),
            Err(_) => Err(StageError::Lost),
        };
        let tokenized = match outcome {
            Ok(tokenized) => tokenized,
            Err(error) => {
                job.ticket.span.in_scope(|| report(&error));
                return job.ticket.finish(Err(error));
            }
        };
        let encoded = matches!(job.payload.input, ImageInput::Encoded(_));
        let given = matches!(
            job.payload.input,
            ImageInput::Tokens(_) | ImageInput::Prefix(_)
        );
        metrics.preprocessed(
            encoded.then_some(tokenized.timings.decode),
            (!given).then_some(tokenized.timings.quantize),
        );
        let Job {
            work, mut ticket, ..
        } = job;
        ticket.entered_at = Instant::now();
        ticket.timeline.tokenized(ticket.entered_at);
        let mut tokens = tokenized.tokens;
        match work {
            RequestedWork::Tokenize => ticket.finish(Ok(Answer::Tokens(tokens))),
            RequestedWork::Infer { context, .. } => {
                if context == Context::SosShifted {
                    shift(&mut tokens, preprocessor.start_token());
                }
                let payload = Arc::from(tokens);
                self.hand_on(PreparedWork::Row(Job {
                    payload,
                    work,
                    ticket,
                }));
            }
            RequestedWork::Generate(generate) => {
                let (side, start) = (preprocessor.side(), preprocessor.start_token());
                let mut sequence = Sequence::new(ticket, generate, &tokens, side, start);
                // Known rows are complete before anything is drawn.
                sequence.send_rows();
                if sequence.is_done() {
                    sequence.finish(Ok(()));
                } else {
                    self.hand_on(PreparedWork::Sequence(sequence));
                }
            }
        }
    }

    fn hand_on(&self, arrival: PreparedWork) {
        // The batcher's queue has room for as many jobs as there are permits.
        if let Err(refused) = self.batcher.try_send(arrival) {
            match refused.into_inner() {
                PreparedWork::Row(job) => job.ticket.finish(Err(StageError::NotReady)),
                PreparedWork::Sequence(sequence) => sequence.finish(Err(StageError::NotReady)),
            }
        }
    }
}

/// Logs an error that is the worker's fault.
fn report(error: &StageError) {
    match error {
        StageError::Image(cause) if matches!(**cause, PreprocessError::Panicked { .. }) => {
            tracing::error!(%error, "a decoder panicked");
        }
        StageError::Lost => tracing::error!("preprocessing panicked"),
        _ => {}
    }
}

/// Puts the start token first and drops the last pixel.
fn shift(tokens: &mut [u16], start: u16) {
    tokens.rotate_right(1);
    if let Some(first) = tokens.first_mut() {
        *first = start;
    }
}

#[cfg(test)]
mod tests {
    use super::shift;

    #[test]
    fn a_shift_drops_the_last_pixel() {
        let mut tokens = [1, 2, 3, 4];
        shift(&mut tokens, 512);
        assert_eq!(tokens, [512, 1, 2, 3]);
    }
}
