//! Counts of a call's images by their outcomes, also if the call is dropped
//! because its deadline has passed or its caller has disconnected.

use std::time::Instant;

use tonic::Code;

use crate::serve::metrics::Metrics;

/// Counter of a call's images, by outcome. Images that are not counted when the
/// counter is dropped count as cancelled, or as late after the call's deadline.
#[derive(Debug)]
pub(super) struct OutcomeTally {
    metrics: Metrics,
    n_uncounted: usize,
    deadline: Option<Instant>,
}

impl OutcomeTally {
    pub(super) fn new(metrics: Metrics, deadline: Option<Instant>) -> Self {
        Self {
            metrics,
            n_uncounted: 0,
            deadline,
        }
    }

    /// Announces `n_images` more images that will have an outcome.
    pub(super) fn expect(&mut self, n_images: usize) {
        self.n_uncounted += n_images;
    }

    /// Counts the outcome of one image.
    pub(super) fn one(&mut self, code: Code) {
        self.metrics.image(code.into());
        self.n_uncounted = self.n_uncounted.saturating_sub(1);
    }

    /// Counts the same outcome for all images that are left.
    pub(super) fn rest(&mut self, code: Code) {
        while self.n_uncounted > 0 {
            self.one(code);
        }
    }
}

impl Drop for OutcomeTally {
    fn drop(&mut self) {
        let late = self
            .deadline
            .is_some_and(|deadline| deadline <= Instant::now());
        self.rest(if late {
            Code::DeadlineExceeded
        } else {
            Code::Cancelled
        });
    }
}
