//! Draws a color from logits.
//!
//! The random number that decides is a pure function of the seed, the sample
//! and the pixel, and not of earlier or neighboring draws: each draw reads a
//! `ChaCha` stream at its own position. The same logits therefore give the same
//! color in every batch and step.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng as _, SeedableRng as _};

/// Sampling options: temperature, top-k, top-p and seed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Sampling {
    /// Temperature, by which the logits are divided; 0 takes the likeliest
    /// color.
    pub temperature: f32,
    /// Number of likeliest colors to draw from; 0 draws from all.
    pub top_k: u32,
    /// Probability that the colors to draw from have together: the fewest
    /// likeliest colors that reach it are kept.
    pub top_p: f32,
    pub seed: u64,
}

/// Place of a draw: the sample and the pixel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct DrawPlace {
    pub sample: u32,
    pub pixel: u32,
}

/// Color that was drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct DrawnColor {
    pub token: u16,
    /// Natural logarithm of the color's probability under the model itself: at
    /// temperature 1 and over all colors.
    pub log_prob: f32,
}

/// Error for logits that are not finite.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct NotFinite;

/// Largest temperature: at this value the logits are as good as equal.
pub(crate) const TEMPERATURE_MAX: f32 = 100.0;

impl Sampling {
    /// Sampling that always takes the likeliest color.
    #[cfg(test)]
    pub(crate) fn greedy() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            seed: 0,
        }
    }

    /// Draws one color from the logits, which have one value per color.
    ///
    /// # Errors
    ///
    /// Fails if a logit is not finite.
    pub(crate) fn draw(&self, logits: &[f32], place: DrawPlace) -> Result<DrawnColor, NotFinite> {
        if logits.is_empty() || !logits.iter().all(|logit| logit.is_finite()) {
            return Err(NotFinite);
        }
        let best = argmax(logits);
        let max = f64::from(logits[best]);
        let powers = |temperature: f64| -> Vec<f64> {
            let powers = logits
                .iter()
                .map(|&logit| ((f64::from(logit) - max) / temperature).exp());
            powers.collect()
        };
        // Weights are in the order of the colors, so that sums have one order.
        let own = powers(1.0);
        let sum: f64 = own.iter().sum();
        let color = if self.temperature <= 0.0 {
            best
        } else if self.temperature.to_bits() == 1.0_f32.to_bits() {
            self.pick(own, place)
        } else {
            self.pick(powers(f64::from(self.temperature)), place)
        };
        #[expect(clippy::cast_possible_truncation, reason = "rounded once to f32")]
        let log_prob = (f64::from(logits[color]) - max - sum.ln()) as f32;
        Ok(DrawnColor {
            token: u16::try_from(color).unwrap_or(u16::MAX),
            log_prob,
        })
    }

    /// Draws one color from the weights, which have one value per color.
    fn pick(&self, mut weights: Vec<f64>, place: DrawPlace) -> usize {
        let top_k = self.top_k as usize;
        if (1..weights.len()).contains(&top_k) {
            let mut sorted = weights.clone();
            let (_, &mut least, _) =
                sorted.select_nth_unstable_by(top_k - 1, |a, b| b.total_cmp(a));
            keep_from(&mut weights, least);
        }
        if self.top_p < 1.0 {
            let least = nucleus(&weights, f64::from(self.top_p));
            keep_from(&mut weights, least);
        }
        let sum: f64 = weights.iter().sum();
        let mut left = uniform(self.seed, place) * sum;
        let mut last = 0;
        for (color, &weight) in weights.iter().enumerate() {
            if weight > 0.0 {
                if left < weight {
                    return color;
                }
                left -= weight;
                last = color;
            }
        }
        // Rounding may leave a little at the end.
        last
    }
}

/// Returns the likeliest color; the first one among equals.
fn argmax(logits: &[f32]) -> usize {
    let mut best = 0;
    for (color, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = color;
        }
    }
    best
}

/// Sets weights below `least` to zero, so that their colors are not drawn;
/// equal weights are kept together.
fn keep_from(weights: &mut [f64], least: f64) {
    for weight in weights {
        if *weight < least {
            *weight = 0.0;
        }
    }
}

/// Returns the smallest weight of the nucleus, which is the fewest largest
/// weights that make up `part` of the sum (top-p).
fn nucleus(weights: &[f64], part: f64) -> f64 {
    let mut sorted: Vec<f64> = weights.iter().copied().filter(|w| *w > 0.0).collect();
    sorted.sort_unstable_by(|a, b| b.total_cmp(a));
    let enough = part * sorted.iter().sum::<f64>();
    let mut so_far = 0.0;
    for weight in sorted {
        so_far += weight;
        if so_far >= enough {
            return weight;
        }
    }
    0.0
}

/// Returns a number from 0 to less than 1 that depends on the seed and the
/// place alone.
fn uniform(seed: u64, place: DrawPlace) -> f64 {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    let mut random = ChaCha8Rng::from_seed(key);
    random.set_stream(place.sample.into());
    // Two words of 32 bits make one number.
    random.set_word_pos(u128::from(place.pixel) * 2);
    #[expect(clippy::cast_precision_loss, reason = "53 bits fit")]
    {
        (random.next_u64() >> 11) as f64 / (1_u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 8] = [0.0, 1.0, -1.0, 2.0, 0.5, -3.0, 1.5, 0.25];

    fn sampling(temperature: f32, top_k: u32, top_p: f32) -> Sampling {
        Sampling {
            temperature,
            top_k,
            top_p,
            seed: 7,
        }
    }

    fn counts(sampling: Sampling, n: u32) -> [u32; 8] {
        let mut counts = [0; 8];
        for idx in 0..n {
            // Both parts of a place must give independent numbers.
            let place = DrawPlace {
                sample: idx % 16,
                pixel: idx / 16,
            };
            let drawn = sampling.draw(&LOGITS, place).expect("finite");
            counts[usize::from(drawn.token)] += 1;
        }
        counts
    }

    /// Pearson's chi-squared statistic of counts against weights.
    fn chi_square(counts: &[u32], weights: &[f64]) -> f64 {
        let sum: f64 = weights.iter().sum();
        let n: f64 = counts.iter().map(|&count| f64::from(count)).sum();
        counts
            .iter()
            .zip(weights)
            .filter(|(_, weight)| **weight > 0.0)
            .map(|(&count, weight)| {
                let expected = n * weight / sum;
                (f64::from(count) - expected).powi(2) / expected
            })
            .sum()
    }

    #[test]
    fn draws_are_distributed_as_softmax_says() {
        for temperature in [0.5, 1.0, 2.0] {
            let weights = LOGITS.map(|logit| (f64::from(logit) / f64::from(temperature)).exp());
            let statistic = chi_square(&counts(sampling(temperature, 0, 1.0), 100_000), &weights);
            // 7 degrees of freedom: larger once in 10,000 seeds.
            assert!(statistic < 29.9, "{temperature}: {statistic}");
        }
    }

    #[test]
    fn only_the_likeliest_are_drawn_from() {
        let mut weights = LOGITS.map(|logit| f64::from(logit).exp());
        let top = counts(sampling(1.0, 3, 1.0), 20_000);
        for color in [0, 2, 4, 5, 7] {
            assert_eq!(top[color], 0);
            weights[color] = 0.0;
        }
        // 2 degrees of freedom: larger once in 10,000 seeds.
        assert!(chi_square(&top, &weights) < 18.4);
        // The three likeliest have 0.42, 0.26 and 0.16.
        let nucleus = counts(sampling(1.0, 0, 0.6), 20_000);
        let drawn: Vec<usize> = (0..8).filter(|&color| nucleus[color] > 0).collect();
        assert_eq!(drawn, [3, 6]);
        assert_eq!(counts(sampling(1.0, 0, 1e-9), 10)[3], 10);
        assert_eq!(counts(sampling(1.0, 1, 1.0), 10)[3], 10);
        assert_eq!(counts(sampling(0.0, 0, 1.0), 10)[3], 10);
    }

    #[test]
    fn a_place_and_a_seed_decide() {
        let draw = |seed, sample, pixel| {
            let sampling = Sampling {
                seed,
                ..sampling(1.0, 0, 1.0)
            };
            let place = DrawPlace { sample, pixel };
            sampling.draw(&LOGITS, place).expect("finite").token
        };
        let row = |seed, sample| {
            (0..64)
                .map(|pixel| draw(seed, sample, pixel))
                .collect::<Vec<_>>()
        };
        assert_eq!(row(1, 0), row(1, 0));
        assert_ne!(row(1, 0), row(2, 0));
        assert_ne!(row(1, 0), row(1, 1));
        // Pinned: a seed must mean the same in every version.
        let places = [(0, 0, 0), (1, 0, 0), (1, 1, 0), (1, 0, 1)];
        let pinned = places.map(|(seed, sample, pixel)| uniform(seed, DrawPlace { sample, pixel }));
        let distinct: std::collections::BTreeSet<u64> =
            pinned.iter().map(|number| number.to_bits()).collect();
        assert_eq!(distinct.len(), 4);
        let words = [
            ((0, 0, 0), 0x3fea_c80b_f125_fde0),
            ((1, 0, 0), 0x3fd8_6a52_9268_3a56),
            ((1, 1, 0), 0x3fba_8125_d48c_6fe8),
            ((1, 0, 1), 0x3fd2_e016_dcbb_7540),
            // On both sides of a block's end, and at the end of the range.
            ((7, 3, 7), 0x3fa6_2723_06ed_1be0),
            ((7, 3, 8), 0x3fe1_1df8_0338_a103),
            ((u64::MAX, u32::MAX, u32::MAX), 0x3fe2_6604_ed2b_c255),
        ];
        for ((seed, sample, pixel), bits) in words {
            let number = uniform(seed, DrawPlace { sample, pixel });
            assert_eq!(number.to_bits(), bits, "{seed} {sample} {pixel}: {number}");
        }
        assert_eq!(row(1, 0)[..8], [3, 3, 6, 6, 6, 1, 6, 6]);
    }

    #[test]
    fn log_probabilities_are_the_models_own() {
        let hot = sampling(50.0, 2, 0.9);
        let drawn = hot
            .draw(
                &LOGITS,
                DrawPlace {
                    sample: 0,
                    pixel: 0,
                },
            )
            .expect("finite");
        let sum: f64 = LOGITS.iter().map(|&logit| f64::from(logit).exp()).sum();
        let expected = f64::from(LOGITS[usize::from(drawn.token)]) - sum.ln();
        assert!((f64::from(drawn.log_prob) - expected).abs() < 1e-6);
        assert_eq!(
            hot.draw(
                &[0.0, f32::INFINITY],
                DrawPlace {
                    sample: 0,
                    pixel: 0
                }
            ),
            Err(NotFinite)
        );
    }
}
