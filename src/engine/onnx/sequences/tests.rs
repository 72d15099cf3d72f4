//! Tests, on a CPU, of the step of one size that a GPU uses: it must draw the
//! same as steps of several sizes.

use super::super::copies::tests::over;
use super::cache::{Buffer, Place};
use super::*;
use crate::compile::{CompileOptions, ModelSource, Silent};
use crate::gpu::copies::tests::FakeDriver;
use crate::model::GraphFiles;
use crate::model::precision::{CompileTask, Provider};
use crate::runtime::library::{environment, find_library};

const POSITIONS: usize = 1024;
const COLORS: usize = 512;
const SLOTS: usize = 3;

/// Loads the model's sequences; with `one_size`, steps run as if they were
/// captured.
fn sequences(folder: &Path, one_size: bool) -> SequenceEngine {
    sequences_with(&mut by_runtime(), folder, one_size)
}

fn sequences_with(copies: &mut EngineCopies, folder: &Path, one_size: bool) -> SequenceEngine {
    let environment = environment(&find_library(None)).expect("make setup has brought it");
    // ONNX Runtime's attention, as on a GPU.
    let runtime = Runtime {
        operators: None,
        n_threads: 1,
        cuda_graphs: one_size,
        ..Runtime::new(environment, Provider::Cpu).expect("a runtime")
    };
    load(folder, &runtime, copies)
}

fn by_runtime() -> EngineCopies {
    EngineCopies::by_runtime()
}

/// Loads a model's sequences with the worker's own operators.
fn with_own_operators() -> SequenceEngine {
    let folder = tempfile::tempdir().expect("a folder");
    let environment = environment(&find_library(None)).expect("make setup has brought it");
    let runtime = Runtime {
        n_threads: 2,
        ..Runtime::new(environment, Provider::Cpu).expect("a runtime")
    };
    load(&folder.path().join("model"), &runtime, &mut by_runtime())
}

fn load(folder: &Path, runtime: &Runtime, copies: &mut EngineCopies) -> SequenceEngine {
    let path = folder.join("generate.onnx");
    if !path.exists() {
        let options = CompileOptions {
            tasks: Some([CompileTask::Generate].into()),
            ..CompileOptions::default()
        };
        let source = ModelSource::parse("random:tiny", None);
        crate::compile::compile(&source, folder, &options, runtime, &mut Silent)
            .expect("a compiled model");
    }
    let options = SequenceOptions {
        n_slots: SLOTS,
        bytes_max: 1 << 30,
        positions: POSITIONS,
        n_colors: COLORS,
        attention: GpuAttention::Auto,
    };
    let files = GraphFiles::of(&[path.clone(), folder.join("weights.bin")]);
    let mut loader = Loader::new(files, std::iter::once(&path)).expect("files");
    let engine = SequenceEngine::open(runtime, &mut loader, &path, options);
    let mut engine = engine.expect("sequences");
    engine.prepare(copies).expect("a key/value cache");
    engine.warm_up(copies).expect("a warm engine");
    engine
}

/// Feeds a primer of `n_tokens` tokens to a slot and returns their number.
fn prime(engine: &mut SequenceEngine, slot: usize, n_tokens: u16) -> usize {
    let tokens: Vec<u16> = (0..n_tokens).map(|idx| idx * 23 % 512).collect();
    let feed = SlotFeed {
        first_slot: slot,
        rows: &[SlotFeedRow {
            tokens: &tokens,
            past: 0,
        }],
        prefixes: &[],
    };
    let primed = engine.feed(&feed, &mut by_runtime(), &mut Vec::new(), &mut None);
    primed.expect("a primer");
    tokens.len()
}

/// Returns the logits of `n_steps` steps, each of which feeds a token to each
/// slot.
fn steps(
    engine: &mut SequenceEngine,
    copies: &mut EngineCopies,
    n_steps: u16,
    pasts: [usize; SLOTS],
    prefixes: &[SharedPrefix],
) -> Result<Vec<f32>, EngineError> {
    let mut all = Vec::new();
    let mut of_run = Vec::new();
    for step in 0..n_steps {
        let tokens: Vec<u16> = (0..3).map(|slot| (step * 31 + slot * 7) % 512).collect();
        let rows: Vec<SlotFeedRow<'_>> = tokens
            .iter()
            .zip(pasts)
            .map(|(token, past)| SlotFeedRow {
                tokens: std::slice::from_ref(token),
                past: past + usize::from(step),
            })
            .collect();
        let feed = SlotFeed {
            first_slot: 0,
            rows: &rows,
            prefixes,
        };
        engine.feed(&feed, copies, &mut of_run, &mut None)?;
        assert_eq!(of_run.len(), SLOTS * COLORS);
        all.extend_from_slice(&of_run);
    }
    Ok(all)
}

/// Returns the logits of some steps after a primer in one slot.
fn logits(engine: &mut SequenceEngine) -> Vec<f32> {
    logits_with(&mut by_runtime(), engine)
}

fn logits_with(copies: &mut EngineCopies, engine: &mut SequenceEngine) -> Vec<f32> {
    let n_primer = prime(engine, 1, 20);
    steps(engine, copies, 6, [0, n_primer, 0], &[]).expect("steps")
}

#[test]
fn a_step_of_one_size_draws_the_same() {
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path().join("model");
    let mut several = sequences(&folder, false);
    let sizes: Vec<usize> = several.facts.sizes().iter().collect();
    assert_eq!(sizes, [2, 3]);
    let mut one = sequences(&folder, true);
    let sizes: Vec<usize> = one.facts.sizes().iter().collect();
    assert_eq!(sizes, [3]);
    let (several, one) = (logits(&mut several), logits(&mut one));
    let distance = several.iter().zip(&one).map(|(a, b)| (a - b).abs());
    let worst = distance.fold(0.0, f32::max);
    assert!(worst < 1e-5, "{worst}");
    // The logits are not all zero.
    assert!(several.iter().any(|logit| logit.abs() > 0.1));
}

/// Compares three samples of one primer with and without a shared prefix.
#[test]
fn a_shared_prefix_changes_no_bit() {
    let mut engine = with_own_operators();
    assert!(engine.facts.shares_prefixes);
    let n_primer = prime(&mut engine, 0, 50);
    for slot in 1..SLOTS {
        assert!(engine.copy_slot(0, slot, n_primer));
    }
    let mut drawn = |prefixes: &[SharedPrefix]| {
        steps(
            &mut engine,
            &mut by_runtime(),
            20,
            [n_primer; SLOTS],
            prefixes,
        )
    };
    let apart = drawn(&[]).expect("steps");
    let shared = |len| [SharedPrefix { of: 0, len }; SLOTS];
    let alike = drawn(&shared(n_primer)).expect("steps");
    assert!(apart == alike, "a shared prefix changes logits");
    // The operator does use the prefixes.
    let error = drawn(&shared(n_primer + 1)).expect_err("a prefix that nobody has");
    assert!(error.to_string().contains("cannot share"), "{error}");
}

/// Compares a sequence that runs alone with the same sequence beside two
/// others.
#[test]
fn a_step_of_one_row_changes_no_bit() {
    let mut engine = with_own_operators();
    assert_eq!(engine.facts.rows_min, 1);
    let beside = steps(&mut engine, &mut by_runtime(), 20, [0; SLOTS], &[]).expect("steps");
    let mut of_run = Vec::new();
    for (step, beside) in (0..20).zip(beside.chunks_exact(SLOTS * COLORS)) {
        let row = SlotFeedRow {
            tokens: &[step * 31 % 512],
            past: usize::from(step),
        };
        let feed = SlotFeed {
            first_slot: 0,
            rows: &[row],
            prefixes: &[],
        };
        let alone = engine.feed(&feed, &mut by_runtime(), &mut of_run, &mut None);
        alone.expect("a step");
        assert!(of_run == beside[..COLORS], "step {step}");
    }
}

/// Returns the keys or values of all slots in a buffer, slot after slot.
fn numbers(buffer: &mut Buffer) -> &mut [f32] {
    match &mut buffer.place {
        Place::Host(memory) => bytemuck::cast_slice_mut(memory),
        Place::Device(tensor) => tensor.try_extract_tensor_mut::<f32>().expect("f32").1,
    }
}

/// Runs the checks of a cache of a GPU on one model, since compiling the model
/// takes most of the time.
#[test]
fn a_gpus_cache_is_clean_and_takes_primers_in_pieces() {
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path().join("model");
    memory_is_zero_before_the_first_sequence(&folder);
    a_slot_that_is_cleared_has_zeros_and_the_others_keep_theirs(&folder);
    a_primer_in_pieces_is_the_same_primer(&folder);
    a_step_over_the_driver_changes_no_bit(&folder);
}

fn a_step_over_the_driver_changes_no_bit(folder: &Path) {
    let driver = FakeDriver::new();
    let mut copies = over(&driver);
    let mut other = sequences_with(&mut copies, folder, true);
    assert_eq!(copies.refusal(), None);
    let warm = driver.count("downloads");
    let got = logits_with(&mut copies, &mut other);
    assert!(driver.count("downloads") > warm);
    assert!(got == logits(&mut sequences(folder, true)));
}

fn a_slot_that_is_cleared_has_zeros_and_the_others_keep_theirs(folder: &Path) {
    for one_size in [false, true] {
        let mut engine = sequences(folder, one_size);
        let expected = logits(&mut engine);
        engine.fill_slots(0, SLOTS, f32::NAN).expect("all slots");
        for buffer in &mut engine.cache.buffers {
            assert!(numbers(buffer).iter().all(|number| number.is_nan()));
        }
        engine.fill_slots(1, 1, 0.0).expect("a slot");
        let slot_len = engine.cache.layout.slot.iter().product::<usize>();
        for buffer in &mut engine.cache.buffers {
            let slots: Vec<&[f32]> = numbers(buffer).chunks_exact(slot_len).collect();
            assert_eq!(slots.len(), SLOTS);
            assert!(slots[1].iter().all(|&number| number == 0.0), "{one_size}");
            let others = slots[0].iter().chain(slots[2]);
            assert!(
                others.into_iter().all(|number| number.is_nan()),
                "{one_size}"
            );
        }
        engine.fill_slots(0, SLOTS, 0.0).expect("all slots");
        for buffer in &mut engine.cache.buffers {
            assert!(numbers(buffer).iter().all(|&number| number == 0.0));
        }
        assert!(logits(&mut engine) == expected, "{one_size}");
        engine
            .fill_slots(1, SLOTS, 0.0)
            .expect_err("beyond the last slot");
        engine
            .fill_slots(usize::MAX, 2, 0.0)
            .expect_err("beyond all memory");
    }
}

fn memory_is_zero_before_the_first_sequence(folder: &Path) {
    let mut engine = sequences(folder, true);
    // Positions that the warm-up has not written.
    let [_, positions, position_len] = engine.cache.layout.slot;
    for buffer in &mut engine.cache.buffers {
        for head in numbers(buffer).chunks_exact(positions * position_len) {
            let rest = &head[positions / 2 * position_len..];
            assert!(rest.iter().all(|&number| number == 0.0));
        }
    }
}

fn a_primer_in_pieces_is_the_same_primer(folder: &Path) {
    let mut engine = sequences(folder, true);
    assert!(engine.facts.chunks_are_powers);
    let pieces: Vec<usize> = engine.facts.pieces(POSITIONS).collect();
    assert_eq!(pieces, [64, 32, 16, 8, 4, 2, 1]);
    let tokens: Vec<u16> = (0..45).map(|idx| idx * 23 % 512).collect();
    let mut feed = |past: usize, length: usize| {
        let feed = SlotFeed {
            first_slot: 2,
            rows: &[SlotFeedRow {
                tokens: &tokens[past..past + length],
                past,
            }],
            prefixes: &[],
        };
        let mut logits = Vec::new();
        let fed = engine.feed(&feed, &mut by_runtime(), &mut logits, &mut None);
        fed.expect("a piece");
        logits
    };
    let whole = feed(0, 45);
    let mut last = Vec::new();
    for (past, length) in [(0, 32), (32, 8), (40, 4), (44, 1)] {
        last = feed(past, length);
    }
    let distance = whole.iter().zip(&last).map(|(a, b)| (a - b).abs());
    let worst = distance.fold(0.0, f32::max);
    assert!(worst < 1e-4, "{worst}");
}
