//! Sequences on the fake engine, in which every color follows from all tokens
//! before it: a slot that kept the past of another sequence would show.

use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::*;
use crate::engine::fake::{FakeEngine, FakeSequences, Script};
use crate::serve::fair::CallerId;
use crate::serve::generate::{GenerateRequest, KeptPixels};
use crate::serve::job::{Answer, Permit, Reply, Ticket};
use crate::serve::sequence::Sampling;

const COLORS: u16 = 50;
const SIDE: usize = 8;

type Outcome = oneshot::Receiver<Result<Answer, StageError>>;

struct Bench {
    decoder: Decoder,
    engine: FakeEngine,
    metrics: Metrics,
}

fn bench(n_slots: usize, can_copy: bool, script: Script) -> Bench {
    let engine = FakeEngine::new(Script {
        sequences: Some(FakeSequences {
            n_slots,
            n_colors: COLORS.into(),
            delay: Duration::ZERO,
            can_copy,
        }),
        ..script
    });
    let metrics = Metrics::new().expect("metrics");
    Bench {
        decoder: Decoder::new(engine.facts().sequences, metrics.clone()),
        engine,
        metrics,
    }
}

fn sequence(primer: &[u16], deadline: Option<Instant>) -> (Sequence, Outcome) {
    let (reply, outcome) = Reply::new();
    let ticket = Ticket {
        caller: CallerId::UNNAMED,
        class: Priority::Interactive,
        deadline,
        entered_at: Instant::now(),
        span: tracing::Span::none(),
        timeline: crate::serve::timeline::ImageTimeline::none(),
        reply,
        permit: Permit::none(),
    };
    let generate = GenerateRequest {
        keep: KeptPixels::All,
        sampling: Sampling::greedy(),
        sample: 0,
        rows: None,
    };
    let sequence = Sequence::new(ticket, Box::new(generate), primer, SIDE, COLORS);
    (sequence, outcome)
}

fn expected(primer: &[u16]) -> Vec<u16> {
    FakeEngine::greedy(COLORS, primer, COLORS.into(), SIDE * SIDE)
}

impl Bench {
    fn join(&mut self, primer: &[u16]) -> Outcome {
        let (sequence, outcome) = sequence(primer, None);
        self.decoder.join(vec![sequence]);
        outcome
    }

    fn step(&mut self) -> DecoderStep {
        self.decoder.step(&mut self.engine).expect("a step")
    }

    fn tokens(&mut self, outcome: &mut Outcome) -> Vec<u16> {
        for _ in 0..4 * SIDE * SIDE {
            match outcome.try_recv() {
                Ok(Ok(Answer::Generated { tokens, .. })) => return tokens.into_vec(),
                Ok(other) => panic!("{other:?}"),
                Err(_) => {
                    self.step();
                }
            }
        }
        panic!("it does not end")
    }

    fn sample(&self, series: &str) -> String {
        let page = self.metrics.render();
        let line = page.lines().find_map(|line| line.strip_prefix(series));
        line.expect("a sample").trim().to_owned()
    }
}

#[test]
fn sequences_come_and_go_and_each_is_its_own() {
    for can_copy in [true, false] {
        let mut bench = bench(4, can_copy, Script::default());
        // Primers within a chunk, over several, and none.
        let primers: Vec<Vec<u16>> = (0..12_u16)
            .map(|n| (0..n * 5).map(|pixel| (pixel * n + n) % COLORS).collect())
            .collect();
        let mut open: Vec<(usize, Outcome)> = Vec::new();
        let mut next = 0;
        let mut done = 0;
        let mut images = 0.0;
        while done < primers.len() {
            if next < primers.len() && bench.decoder.sequences().n_free > 0 {
                open.push((next, bench.join(&primers[next])));
                next += 1;
            }
            images += bench.step().images;
            open.retain_mut(|(idx, outcome)| match outcome.try_recv() {
                Ok(Ok(Answer::Generated { tokens, .. })) => {
                    assert_eq!(*tokens, *expected(&primers[*idx]), "primer {idx}");
                    done += 1;
                    false
                }
                Ok(other) => panic!("{other:?}"),
                Err(_) => true,
            });
        }
        assert_eq!(bench.decoder.sequences().n_free, 4);
        // Each image is counted once, however many steps it took.
        assert!((images - 12.0_f64).abs() < 1e-9, "{images}");
    }
}

#[test]
fn a_step_is_as_large_as_its_sequences_need() {
    let mut bench = bench(8, true, Script::default());
    let long = bench.join(&[]);
    let short: Vec<Outcome> = (0..6).map(|_| bench.join(&expected(&[])[..60])).collect();
    assert_eq!(bench.step().size, 2, "never of one row");
    let mut largest = 0;
    while bench.decoder.sequences().interactive > 1 {
        largest = largest.max(bench.step().size);
    }
    assert_eq!(largest, 8);
    assert_eq!(bench.step().size, 2);
    drop((long, short));
}

#[test]
fn whoever_is_alone_in_a_high_slot_moves_down() {
    let mut bench = bench(8, true, Script::default());
    let mut outcomes: Vec<Outcome> = (0..8_u16).map(|n| bench.join(&[n, n])).collect();
    for _ in 0..4 {
        bench.step();
    }
    let mut last = outcomes.pop().expect("eight");
    drop(outcomes);
    assert_eq!(bench.step().size, 2);
    assert_eq!(bench.tokens(&mut last), expected(&[7, 7]));
}

#[test]
fn one_primer_is_fed_once() {
    let primer: Vec<u16> = (0..20).collect();
    let fed = |can_copy| {
        let mut bench = bench(4, can_copy, Script::default());
        let mut outcomes: Vec<Outcome> = (0..4).map(|_| bench.join(&primer)).collect();
        for outcome in &mut outcomes {
            assert_eq!(bench.tokens(outcome), expected(&primer));
        }
        bench.sample("imagegpt_tokens_total{kind=\"primer\"}")
    };
    // The start token and 19 pixels; the last goes with the first step.
    assert_eq!(fed(true), "20");
    assert_eq!(fed(false), "80");
}

/// Shared prefixes of slots, and the sequences whose tokens they hold.
fn shared(of: &[(&[u16], usize)]) -> Vec<(usize, usize)> {
    let slots: Vec<_> = of
        .iter()
        .map(|(primer, n_fed)| {
            let (mut sequence, _) = sequence(primer, None);
            sequence.fed(*n_fed);
            Some(sequence)
        })
        .chain([None])
        .collect();
    let mut prefixes = super::prefixes::prefixes(&slots);
    assert_eq!(prefixes.pop().map(|prefix| prefix.len), Some(0));
    let pairs = prefixes.iter().map(|prefix| (prefix.of, prefix.len));
    pairs.collect()
}

#[test]
fn those_who_begin_alike_share_what_saves_most() {
    let image: Vec<u16> = (0..63).map(|pixel| pixel % COLORS).collect();
    let other: Vec<u16> = (0..63).map(|pixel| (pixel * 3 + 1) % COLORS).collect();
    let half: Vec<u16> = [&image[..31], &other[..30]].concat();
    let none = |slot: usize| (slot, 0);
    // Two share whole blocks of the tokens that both were fed, with the start
    // token; two others less than a block, and two nothing.
    assert_eq!(
        shared(&[
            (&image, 50),
            (&other, 64),
            (&image, 40),
            (&other, 60),
            (&image, 15),
            (&[], 1),
            (&[], 0)
        ]),
        [
            none(0),
            none(1),
            (0, 32),
            (1, 48),
            none(4),
            none(5),
            none(6)
        ]
    );
    // Three who share 32 save more than two who share 48, and less than three.
    let [a, b, c] = [(&image[..], 60), (&image[..], 60), (&half[..], 60)];
    assert_eq!(shared(&[c, a, b]), [none(0), (0, 32), (0, 32)]);
    assert_eq!(shared(&[a, c, b, a]), [none(0), none(1), (0, 48), (0, 48)]);
    assert_eq!(shared(&[c, a, c, b]), [none(0), none(1), (0, 48), (1, 48)]);
}

#[test]
fn what_is_saved_does_not_depend_on_who_came_first() {
    let image: Vec<u16> = (0..63).map(|pixel| pixel % COLORS).collect();
    // White margins, for example: alike for a block, and then not.
    let half: Vec<u16> = image
        .iter()
        .enumerate()
        .map(|(pixel, color)| if pixel < 20 { *color } else { 7 })
        .collect();
    let mut seen = std::collections::BTreeSet::new();
    for order in 0..1_u32 << 8 {
        if order.count_ones() == 3 {
            let of = |slot: u32| {
                if order >> slot & 1 == 1 {
                    &half
                } else {
                    &image
                }
            };
            let slots: Vec<(&[u16], usize)> = (0..8).map(|slot| (&of(slot)[..], 64)).collect();
            seen.insert(shared(&slots).iter().map(|(_, len)| len).sum::<usize>());
        }
    }
    // Two samples of one primer and four of the other read none of 64
    // positions.
    assert_eq!(seen.into_iter().collect::<Vec<_>>(), [6 * 64]);
}

#[test]
fn samples_of_a_primer_share_it_as_long_as_there_are_several() {
    let mut bench = bench(4, true, Script::default());
    let primer: Vec<u16> = (0..40).collect();
    let mut outcomes: Vec<Outcome> = (0..3).map(|_| bench.join(&primer)).collect();
    while bench.step().size == 0 {}
    let shared = |bench: &Bench| {
        let prefixes = super::prefixes::prefixes(&bench.decoder.slots);
        prefixes.iter().map(|prefix| prefix.len).collect::<Vec<_>>()
    };
    assert_eq!(shared(&bench), [0, 32, 32, 0], "whole blocks");
    // All draw the likeliest color, and so also share the colors that they
    // draw.
    while bench.decoder.slots[0].as_ref().expect("there").n_fed() < 48 {
        bench.step();
    }
    assert_eq!(shared(&bench), [0, 48, 48, 0]);
    drop(outcomes.remove(0));
    bench.decoder.sweep(Instant::now());
    assert_eq!(shared(&bench), [0, 0, 48, 0]);
    for outcome in &mut outcomes {
        assert_eq!(bench.tokens(outcome), expected(&primer));
    }
}

#[test]
fn a_primer_does_not_hold_up_the_others() {
    let mut bench = bench(2, true, Script::default());
    let mut drawing = bench.join(&[]);
    bench.step();
    let primer = expected(&[3])[..41].to_vec();
    let mut primed = bench.join(&primer);
    // 41 tokens in chunks of 8: five turns, in each of which the other goes on.
    let before = bench.sample("imagegpt_tokens_total{kind=\"step\"}");
    for _ in 0..5 {
        assert_eq!(bench.step().size, 2);
    }
    assert_eq!(before, "1");
    assert_eq!(bench.sample("imagegpt_tokens_total{kind=\"step\"}"), "6");
    assert_eq!(bench.sample("imagegpt_tokens_total{kind=\"primer\"}"), "40");
    assert_eq!(bench.tokens(&mut drawing), expected(&[]));
    assert_eq!(bench.tokens(&mut primed), expected(&[3]));
}

#[test]
fn whoever_has_gone_or_is_late_leaves_at_the_next_step() {
    let mut bench = bench(2, true, Script::default());
    let gone = bench.join(&[]);
    let (late, mut late_outcome) = sequence(&[], Some(Instant::now()));
    bench.decoder.join(vec![late]);
    drop(gone);
    bench.step();
    assert_eq!(bench.decoder.sequences().n_free, 2);
    assert!(matches!(
        late_outcome.try_recv(),
        Ok(Err(StageError::DeadlineExceeded { .. }))
    ));
}

#[test]
fn a_step_that_fails_fails_only_whom_it_cannot_compute() {
    let script = Script {
        fail_on: Some(expected(&[1])[30]),
        ..Script::default()
    };
    let poison = script.fail_on;
    let mut bench = bench(4, true, script);
    let primers = [1_u16, 2, 3, 4];
    let mut outcomes: Vec<Outcome> = primers.iter().map(|&n| bench.join(&[n])).collect();
    for (&n, outcome) in primers.iter().zip(&mut outcomes) {
        let image = expected(&[n]);
        let fails = image[..63].iter().any(|&token| Some(token) == poison);
        let answer = loop {
            match outcome.try_recv() {
                Ok(answer) => break answer,
                Err(_) => bench.step(),
            };
        };
        match answer {
            Ok(Answer::Generated { tokens, .. }) => {
                assert!(!fails);
                assert_eq!(*tokens, *image);
            }
            Err(StageError::Engine(_)) => assert!(fails),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_device_that_fails_ends_the_engine() {
    let script = Script {
        device_fails_on: Some(COLORS),
        ..Script::default()
    };
    let mut bench = bench(2, true, script);
    let mut outcome = bench.join(&[]);
    let error = bench.decoder.step(&mut bench.engine).expect_err("fatal");
    assert!(matches!(error, EngineError::Device(_)));
    bench.decoder.refuse(&StageError::NotReady);
    assert!(matches!(outcome.try_recv(), Ok(Err(StageError::NotReady))));
}

/// Returns a color that the sequence after `[1, 2, 3]` never draws.
fn undrawn() -> u16 {
    let drawn = expected(&[1, 2, 3]);
    let color = (0..COLORS).find(|color| !drawn.contains(color));
    color.expect("not every color is drawn")
}

#[test]
fn numbers_that_are_none_do_not_outlive_their_sequence() {
    let bad = undrawn();
    // In a chunk of the primer, as its last token, and as a token after an
    // unknown pixel.
    for primer in [vec![bad, 1, 2, 3], vec![1, 2, bad]] {
        let script = Script {
            nan_on: Some(bad),
            ..Script::default()
        };
        let mut bench = bench(1, false, script);
        let mut spoiled = bench.join(&primer);
        for _ in 0..=primer.len() {
            bench.step();
        }
        let answer = spoiled.try_recv().expect("answered at once");
        answer.expect_err("its numbers are not finite");
        // The next sequence in the slot.
        let mut next = bench.join(&[1, 2, 3]);
        assert_eq!(bench.tokens(&mut next), expected(&[1, 2, 3]));
    }
}

#[test]
fn a_slot_is_cleared_although_its_caller_left() {
    let bad = undrawn();
    let script = Script {
        nan_on: Some(bad),
        ..Script::default()
    };
    let mut bench = bench(1, false, script);
    let gone = bench.join(&[bad, 1, 2, 3]);
    // The primer spoils the slot in this step, and nothing was drawn yet.
    bench.step();
    drop(gone);
    let mut next = bench.join(&[1, 2, 3]);
    assert_eq!(bench.tokens(&mut next), expected(&[1, 2, 3]));
}
