//! Sequence: one image that is generated pixel by pixel, with its known pixels,
//! its sampling and its progress.
//!
//! A [`Sequence`] is the value that travels from preprocessing to the engine.
//! This module knows nothing of queues or of the runtime.

use crate::serve::error::StageError;
use crate::serve::generate::{GenerateRequest, GeneratedRow, KeptPixels};
use crate::serve::job::{Answer, Ticket};
use crate::serve::sample::NotFinite;

pub(crate) use super::sample::{DrawPlace, Sampling};

/// Image that is being generated.
#[derive(Debug)]
pub(crate) struct Sequence {
    pub ticket: Ticket,
    generate: Box<GenerateRequest>,
    side: usize,
    start: u16,
    /// Pixels so far: the known pixels before the first unknown one, then the
    /// pixels that were drawn or forced.
    pixels: Vec<u16>,
    /// Known pixels of the whole image; those after the first unknown pixel are
    /// forced when it is their turn.
    forced: Box<[Option<u16>]>,
    /// Last pixel that is drawn.
    last_unknown: usize,
    /// Smallest number of runs that the sequence needed when it began.
    n_steps: usize,
    /// Number of tokens, the start token and pixels, whose keys and values are
    /// kept.
    n_fed: usize,
    log_probs: Vec<f32>,
    rows_sent: usize,
}

/// Tokens that a sequence has been fed, ordered so that sequences that begin
/// alike are neighbors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Past<'a> {
    pub start: u16,
    pub pixels: &'a [u16],
}

impl Sequence {
    /// Creates the sequence for `tokens` from preprocessing, of an image of
    /// `side` by `side` pixels with the start token `start`.
    #[must_use]
    pub(crate) fn new(
        ticket: Ticket,
        generate: Box<GenerateRequest>,
        tokens: &[u16],
        side: usize,
        start: u16,
    ) -> Self {
        let n_pixels = side * side;
        let is_known = |pixel: usize| {
            pixel < tokens.len()
                && match &generate.keep {
                    KeptPixels::All => true,
                    KeptPixels::Rows(rows) => pixel < *rows as usize * side,
                    KeptPixels::Mask(mask) => mask.get(pixel).copied().unwrap_or(false),
                }
        };
        let forced: Box<[Option<u16>]> = (0..n_pixels)
            .map(|pixel| is_known(pixel).then(|| tokens[pixel]))
            .collect();
        let pixels = forced.iter().map_while(|&pixel| pixel).collect();
        let last_unknown = forced.iter().rposition(Option::is_none).unwrap_or(0);
        let mut sequence = Self {
            ticket,
            generate,
            side,
            start,
            pixels,
            forced,
            last_unknown,
            n_steps: 0,
            n_fed: 0,
            log_probs: Vec::new(),
            rows_sent: 0,
        };
        sequence.n_steps = sequence.n_steps_left();
        sequence
    }

    /// True if nothing is left to draw.
    #[must_use]
    pub(crate) fn is_done(&self) -> bool {
        self.pixels.len() > self.last_unknown || self.pixels.len() == self.forced.len()
    }

    /// Smallest number of runs that are left to make.
    #[must_use]
    pub(crate) fn n_steps_left(&self) -> usize {
        if self.is_done() {
            0
        } else {
            self.last_unknown + 1 - self.pixels.len()
        }
    }

    /// Fraction of the sequence's runs that are done, from 0 to 1.
    #[must_use]
    pub(crate) fn progress(&self) -> f64 {
        let steps = |n: usize| f64::from(u32::try_from(n).unwrap_or(u32::MAX));
        1.0 - steps(self.n_steps_left()) / steps(self.n_steps.max(1))
    }

    /// Number of tokens whose keys and values are kept.
    #[must_use]
    pub(crate) fn n_fed(&self) -> usize {
        self.n_fed
    }

    /// Number of tokens that can be fed now: the start token and the pixels,
    /// less those that were fed.
    #[must_use]
    pub(crate) fn n_to_feed(&self) -> usize {
        1 + self.pixels.len() - self.n_fed
    }

    /// Returns the next `n` tokens to feed.
    pub(crate) fn to_feed(&self, n: usize) -> impl Iterator<Item = u16> + '_ {
        std::iter::once(self.start)
            .chain(self.pixels.iter().copied())
            .skip(self.n_fed)
            .take(n)
    }

    /// True if the first `n` tokens of both sequences are known and the same.
    #[must_use]
    pub(crate) fn shares(&self, other: &Self, n: usize) -> bool {
        let own = self.pixels.get(..n.saturating_sub(1));
        let others = other.pixels.get(..n.saturating_sub(1));
        self.start == other.start && own.is_some() && own == others
    }

    /// Returns the tokens whose keys and values are kept, if there are any.
    #[must_use]
    pub(crate) fn past(&self) -> Option<Past<'_>> {
        Some(Past {
            start: self.start,
            pixels: self.pixels.get(..self.n_fed.checked_sub(1)?)?,
        })
    }

    /// Records that the keys and values of `n` more tokens are kept.
    pub(crate) fn fed(&mut self, n: usize) {
        self.n_fed += n;
    }

    /// Takes the logits of the next pixel: draws the pixel, or takes it if it
    /// is known. After the last drawn pixel, adds the known pixels that follow.
    ///
    /// # Errors
    ///
    /// Fails if a logit is not finite; nothing is drawn then.
    pub(crate) fn advance(&mut self, logits: &[f32]) -> Result<(), NotFinite> {
        let pixel = self.pixels.len();
        let Some(&forced) = self.forced.get(pixel) else {
            return Ok(());
        };
        let token = if let Some(token) = forced {
            if !all_finite(logits) {
                return Err(NotFinite);
            }
            token
        } else {
            let place = DrawPlace {
                sample: self.generate.sample,
                pixel: u32::try_from(pixel).unwrap_or(u32::MAX),
            };
            let drawn = self.generate.sampling.draw(logits, place)?;
            self.log_probs.push(drawn.log_prob);
            drawn.token
        };
        self.pixels.push(token);
        if self.is_done() {
            // The rest is known, and its probability is not asked for.
            let rest = self.forced[self.pixels.len()..]
                .iter()
                .map_while(|&token| token);
            self.pixels.extend(rest);
        }
        self.send_rows();
        Ok(())
    }

    /// Sends the rows that are complete and not yet sent.
    pub(crate) fn send_rows(&mut self) {
        let Some(rows) = &self.generate.rows else {
            return;
        };
        while let Some(row) = self
            .pixels
            .get(self.rows_sent * self.side..(self.rows_sent + 1) * self.side)
        {
            let row = GeneratedRow {
                sample: self.generate.sample,
                row: u32::try_from(self.rows_sent).unwrap_or(u32::MAX),
                tokens: row.into(),
            };
            // The channel has room for every row; a caller who has disconnected
            // misses the row.
            let _ = rows.try_send(row);
            self.rows_sent += 1;
            if self.rows_sent * self.side >= self.forced.len() {
                return;
            }
        }
    }

    /// Answers the caller with the image or with an error.
    pub(crate) fn finish(self, outcome: Result<(), StageError>) {
        let answer = Answer::Generated {
            tokens: self.pixels.into(),
            log_probs: self.log_probs,
        };
        self.ticket.finish(outcome.map(|()| answer));
    }
}

/// Returns true if no logit is NaN or infinite.
pub(crate) fn all_finite(logits: &[f32]) -> bool {
    const INFINITY: u32 = f32::INFINITY.to_bits();
    // The largest size, rather than a search, takes the CPU's vector
    // instructions.
    let sizes = logits.iter().map(|logit| logit.to_bits() & !(1 << 31));
    sizes.fold(0, u32::max) < INFINITY
}

#[cfg(test)]
mod tests {
    use tokio::sync::mpsc;

    use super::*;
    use crate::proto::Priority;
    use crate::serve::fair::CallerId;
    use crate::serve::job::{Permit, Reply};

    type Outcome = tokio::sync::oneshot::Receiver<Result<Answer, StageError>>;

    /// Image of 2 by 2 pixels over colors 0 to 3; the start token is 4.
    fn sequence(
        tokens: &[u16],
        keep: KeptPixels,
    ) -> (Sequence, Outcome, mpsc::Receiver<GeneratedRow>) {
        let (reply, outcome) = Reply::new();
        let ticket = Ticket {
            caller: CallerId::UNNAMED,
            class: Priority::Interactive,
            deadline: None,
            entered_at: std::time::Instant::now(),
            span: tracing::Span::none(),
            timeline: crate::serve::timeline::ImageTimeline::none(),
            reply,
            permit: Permit::none(),
        };
        let (sender, rows) = mpsc::channel(2);
        let generate = GenerateRequest {
            keep,
            sampling: Sampling::greedy(),
            sample: 3,
            rows: Some(sender),
        };
        let sequence = Sequence::new(ticket, Box::new(generate), tokens, 2, 4);
        (sequence, outcome, rows)
    }

    fn logits(best: usize) -> [f32; 4] {
        let mut logits = [0.0; 4];
        logits[best] = 2.0;
        logits
    }

    fn tokens(outcome: &mut Outcome) -> Vec<u16> {
        match outcome.try_recv() {
            Ok(Ok(Answer::Generated { tokens, .. })) => tokens.into_vec(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn an_image_from_nothing() {
        let (mut sequence, mut outcome, mut rows) = sequence(&[], KeptPixels::All);
        assert_eq!(sequence.to_feed(9).collect::<Vec<_>>(), [4]);
        assert_eq!(sequence.n_steps_left(), 4);
        for best in [1, 2, 3, 0] {
            assert_eq!(sequence.n_to_feed(), 1);
            sequence.fed(1);
            sequence.advance(&logits(best)).expect("finite");
        }
        assert!(sequence.is_done());
        assert_eq!(sequence.log_probs.len(), 4);
        assert_eq!(&*rows.try_recv().expect("a row").tokens, [1, 2]);
        assert_eq!(rows.try_recv().expect("a row").row, 1);
        sequence.finish(Ok(()));
        assert_eq!(tokens(&mut outcome), [1, 2, 3, 0]);
    }

    #[test]
    fn what_is_known_is_fed_at_once() {
        let (mut sequence, mut outcome, _rows) = sequence(&[1, 1, 2, 3], KeptPixels::Rows(1));
        assert_eq!(sequence.to_feed(9).collect::<Vec<_>>(), [4, 1, 1]);
        sequence.fed(3);
        sequence.advance(&logits(0)).expect("finite");
        assert_eq!(sequence.to_feed(9).collect::<Vec<_>>(), [0]);
        sequence.fed(1);
        sequence.advance(&logits(0)).expect("finite");
        assert!(sequence.is_done());
        sequence.finish(Ok(()));
        assert_eq!(tokens(&mut outcome), [1, 1, 0, 0]);
    }

    #[test]
    fn kept_pixels_are_forced_and_the_last_need_no_run() {
        let mask = KeptPixels::Mask([false, true, false, true].into());
        let (mut sequence, mut outcome, mut rows) = sequence(&[1, 1, 2, 3], mask);
        assert_eq!(sequence.n_steps_left(), 3);
        for best in [2, 2, 0] {
            sequence.fed(1);
            sequence.advance(&logits(best)).expect("finite");
        }
        assert!(sequence.is_done());
        assert_eq!(sequence.log_probs.len(), 2, "one for each drawn pixel");
        assert_eq!(&*rows.try_recv().expect("a row").tokens, [2, 1]);
        assert_eq!(&*rows.try_recv().expect("a row").tokens, [0, 3]);
        sequence.finish(Ok(()));
        assert_eq!(tokens(&mut outcome), [2, 1, 0, 3]);
    }

    #[test]
    fn an_image_that_is_all_known_is_done() {
        let (sequence, _outcome, _rows) = sequence(&[1, 1, 2, 3], KeptPixels::All);
        assert!(sequence.is_done());
        assert_eq!(sequence.n_steps_left(), 0);
    }

    #[test]
    fn logits_that_are_no_numbers_draw_nothing() {
        let (mut sequence, _outcome, _rows) = sequence(&[], KeptPixels::All);
        assert!(sequence.advance(&[f32::NAN; 4]).is_err());
        assert_eq!(sequence.n_steps_left(), 4);
    }

    #[test]
    fn a_known_pixel_hides_no_logits_that_are_no_numbers() {
        for bad in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let known = KeptPixels::Mask([false, true, false, false].into());
            let (mut sequence, _outcome, _rows) = sequence(&[1, 1, 2, 3], known);
            sequence
                .advance(&[0.0, 1.0, 0.0, 0.0])
                .expect("it is drawn");
            let logits = [f32::MAX, f32::MIN, -0.0, bad];
            sequence.advance(&logits).expect_err("the pixel is known");
        }
        assert!(all_finite(&[f32::MAX, f32::MIN, -0.0, f32::MIN_POSITIVE]));
    }

    #[test]
    fn primers_are_compared_as_far_as_asked() {
        let (one, ..) = sequence(&[1, 2, 3], KeptPixels::All);
        let (other, ..) = sequence(&[1, 2, 0], KeptPixels::All);
        assert!(one.shares(&other, 3));
        assert!(!one.shares(&other, 4));
        assert!(!one.shares(&other, 5), "there are no more");
    }
}
