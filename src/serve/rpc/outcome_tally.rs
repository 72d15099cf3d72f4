//! Counts each image of a call by its outcome, also when the call is dropped
//! because its time is up or its caller has gone.

use std::time::Instant;

use tonic::Code;

use crate::serve::metrics::Metrics;

/// See the module.
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

    /// So many images more will have an outcome.
    pub(super) fn expect(&mut self, n_images: usize) {
        self.n_uncounted += n_images;
    }

    /// One of them has it.
    pub(super) fn one(&mut self, code: Code) {
        self.metrics.image(code.into());
        self.n_uncounted = self.n_uncounted.saturating_sub(1);
    }

    /// All that are left have the same.
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
