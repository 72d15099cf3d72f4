//! Tests, on a CPU, of loading and of idle checks.

use std::path::Path;

use super::choice::may_capture;
use super::copies::tests::over;
use super::loading::captured_or_not;
use super::*;
use crate::engine::FallbackKind;
use crate::gpu::copies::tests::FakeDriver;
use crate::model::Model;
use crate::model::buckets::Buckets;

/// Returns the outcome of loading that fails with `failures`, and for each
/// attempt whether it was captured.
fn tried(wanted: bool, failures: Vec<EngineError>) -> (Result<Option<String>, String>, Vec<bool>) {
    let mut failures = failures.into_iter();
    let mut tries = Vec::new();
    let outcome = captured_or_not(wanted, |captured| {
        tries.push(captured);
        failures.next().map_or(Ok(()), Err)
    });
    let outcome = outcome.map(|refused| refused.map(|error| error.to_string()));
    (outcome.map_err(|error| error.to_string()), tries)
}

#[test]
fn a_graph_that_cannot_be_captured_is_loaded_without() {
    let refusal = || EngineError::Runtime("no".to_owned());
    let text = refusal().to_string();
    assert_eq!(tried(true, vec![]), (Ok(None), vec![true]));
    assert_eq!(tried(false, vec![]), (Ok(None), vec![false]));
    let without = (Ok(Some(text.clone())), vec![true, false]);
    assert_eq!(tried(true, vec![refusal()]), without);
    // Loading that fails without CUDA graphs, too, has another reason,
    // which is reported.
    let other = EngineError::Runtime("never".to_owned());
    let never = (Err(other.to_string()), vec![true, false]);
    assert_eq!(tried(true, vec![refusal(), other]), never);
    assert_eq!(tried(false, vec![refusal()]), (Err(text), vec![false]));
    // A device that has failed fails again.
    let lost = || EngineError::Device("lost".to_owned());
    let told = (Err(lost().to_string()), vec![true]);
    assert_eq!(tried(true, vec![lost()]), told);
}

/// Loads the smallest model on the CPU.
fn engine() -> OnnxEngine {
    OnnxEngine::load(&options(micro())).expect("an engine")
}

fn micro() -> Model {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/models/micro");
    Model::open(&folder, None).expect("a model")
}

fn options(model: Model) -> OnnxOptions {
    OnnxOptions {
        library: find_library(None),
        provider: ProviderChoice::Cpu,
        device_id: 0,
        intra_op_threads: 1,
        positions: model.positions(),
        n_colors: model.clusters.len(),
        sizes_are_given: true,
        n_labels: 0,
        head_widths: Vec::new(),
        compiled_for: None,
        precision: None,
        graphs: model.graphs,
        files: model.files,
        buckets: Buckets::powers_of_two(1),
        generate_slots: 0,
        generate_bytes_max: 0,
        gpu_memory_limit: None,
        cuda_graphs: false,
        generate_attention: GpuAttention::Auto,
        gpu_copies: GpuCopies::OnnxRuntime,
    }
}

#[test]
fn an_idle_check_waits_until_nobody_captures() {
    static LOCK: CaptureLock = CaptureLock::new();
    let mut engine = engine();
    assert_eq!(engine.captures.map(|_| ()), None, "a CPU captures nothing");
    engine.captures = Some(&LOCK);
    assert_eq!(engine.canary().expect("a check"), CanaryOutcome::Answered);
    // From now on every check fails that is run at all.
    if let Some(canary) = &mut engine.canary {
        canary.answer.fill(9.0);
    }
    engine.canary().expect_err("another answer is known");
    let capturing = LOCK.alone();
    assert_eq!(engine.canary().expect("no run"), CanaryOutcome::Skipped);
    drop(capturing);
    engine.canary().expect_err("nobody captures");
}

#[test]
fn an_engine_that_may_capture_loads_alone() {
    let cuda = OnnxOptions {
        provider: ProviderChoice::Cuda,
        cuda_graphs: true,
        ..options(micro())
    };
    assert!(may_capture(&cuda));
    let without = |change: fn(&mut OnnxOptions)| {
        let mut options = cuda.clone();
        change(&mut options);
        may_capture(&options)
    };
    assert!(!without(|options| options.provider = ProviderChoice::Cpu));
    assert!(!without(|options| options.cuda_graphs = false));
    assert!(!without(|options| options.gpu_memory_limit = Some(1)));
    assert!(!without(
        |options| options.compiled_for = Some(Provider::Cpu)
    ));
    assert!(without(|options| options.provider = ProviderChoice::Auto));
}

#[test]
fn an_answer_that_moved_is_noticed() {
    assert!(distance(&[1.0, 2.0], &[1.0, 2.0]) <= CANARY_TOLERANCE);
    assert!(distance(&[1.0, 2.1], &[1.0, 2.0]) > CANARY_TOLERANCE);
    assert!(distance(&[f32::NAN], &[1.0]).is_infinite());
    assert!(distance(&[], &[1.0]).is_infinite());
}

/// Runs two images whose tokens are all 1 and all 2.
fn two_images(engine: &mut OnnxEngine) -> Result<Vec<Vec<f32>>, EngineError> {
    let images = [1, 2].map(|token| vec![token; engine.positions]);
    let rows = images.each_ref().map(|tokens| BatchRow {
        tokens,
        want: Want::Mean,
    });
    let run = GraphRun {
        graph: Graph::Hidden,
        bucket: 2,
        rows: &rows,
    };
    engine.run(&run, &RunStop::default())
}

#[test]
fn failed_copies_are_told_apart_like_failed_runs() {
    let driver = FakeDriver::new();
    let mut engine = engine();
    engine.copies = over(&driver);
    let answers = two_images(&mut engine).expect("a run");
    assert!(driver.count("downloads") > 0);
    driver.fail("cuMemcpyDtoHAsync", 2);
    let error = two_images(&mut engine).expect_err("no memory");
    assert!(matches!(error, EngineError::OutOfMemory(_)), "{error:?}");
    driver.fail("", 0);
    assert_eq!(two_images(&mut engine).expect("a run"), answers);
    driver.fail("cuStreamSynchronize", 700);
    let error = two_images(&mut engine).expect_err("an illegal address");
    assert!(matches!(error, EngineError::Device(_)), "{error:?}");
    assert!(error.to_string().contains("cuStreamSynchronize"), "{error}");
}

#[test]
fn copies_that_were_asked_for_and_cannot_be_made_are_a_fallback() {
    let mut engine = engine();
    engine.note_copies();
    assert_eq!(engine.facts.fallbacks, []);
    engine
        .copies
        .take(Err("there is no NVIDIA driver".to_owned()));
    engine.note_copies();
    let [fallback] = &engine.facts.fallbacks[..] else {
        panic!("one fallback");
    };
    assert_eq!(fallback.kind, FallbackKind::GpuCopies);
    assert_eq!(fallback.reason, "there is no NVIDIA driver");
}
