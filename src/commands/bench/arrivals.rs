//! Arrival times: when the calls of an open loop are due.

use std::time::Duration;

use super::random::SplitMix64;

/// Distribution of calls over time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Spread {
    /// Poisson process, as of independent callers: exponential gaps.
    Poisson,
    /// Equal gaps.
    Constant,
}

/// Endless iterator over the times, since the start, at which calls are due.
#[derive(Debug, Clone)]
pub(super) struct Arrivals {
    spread: Spread,
    /// Calls per second.
    rate: f64,
    random: SplitMix64,
    /// Time of the last arrival in seconds. Summed in f64, whose error over
    /// hours is below a nanosecond per call.
    at: f64,
}

/// Lowest rate in calls per second; at a lower rate no call would arrive in any
/// run.
const RATE_MIN: f64 = 1e-3;

impl Arrivals {
    #[must_use]
    pub(super) fn new(spread: Spread, rate: f64, seed: u64) -> Self {
        Self {
            spread,
            rate: rate.max(RATE_MIN),
            random: SplitMix64::new(seed),
            at: 0.0,
        }
    }
}

impl Iterator for Arrivals {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        let gap = match self.spread {
            // 1 - u is never 0, so its logarithm is finite.
            Spread::Poisson => -(1.0 - self.random.unit()).ln(),
            Spread::Constant => 1.0,
        };
        self.at += gap / self.rate;
        Duration::try_from_secs_f64(self.at).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn poisson_has_the_rate_and_the_spread() {
        let n = 100_000;
        let times: Vec<f64> = Arrivals::new(Spread::Poisson, 500.0, 1)
            .take(n)
            .map(|time| time.as_secs_f64())
            .collect();
        let gaps: Vec<f64> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
        let n_gaps = f64::from(u32::try_from(gaps.len()).unwrap());
        let mean = gaps.iter().sum::<f64>() / n_gaps;
        let variance = gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / n_gaps;
        // The mean of n exponential gaps has a relative deviation of 1/√n; five
        // times that are allowed.
        assert!((mean * 500.0 - 1.0).abs() < 5.0 / n_gaps.sqrt(), "{mean}");
        // The deviation of an exponential distribution equals its mean.
        assert!((variance.sqrt() / mean - 1.0).abs() < 0.03, "{variance}");
    }

    #[test]
    fn a_seed_repeats_itself() {
        let times = |seed| {
            let arrivals = Arrivals::new(Spread::Poisson, 100.0, seed);
            arrivals.take(100).collect::<Vec<_>>()
        };
        assert_eq!(times(7), times(7));
        assert_ne!(times(7), times(8));
    }

    #[test]
    fn constant_is_even() {
        let times: Vec<Duration> = Arrivals::new(Spread::Constant, 4.0, 0).take(3).collect();
        assert_eq!(times, [250, 500, 750].map(Duration::from_millis));
    }
}
