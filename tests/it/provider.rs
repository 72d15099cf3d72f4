//! The execution provider that runs the model, and how a worker reports that
//! something faster cannot be used. These tests need a machine without a GPU,
//! such as in CI; with a GPU they test nothing.

use imagegpt::engine::fake::Script;
use imagegpt::engine::onnx::{OnnxEngine, OnnxOptions};
use imagegpt::engine::{Engine, EngineFactory, Fallback, FallbackKind};
use imagegpt::model::Model;
use imagegpt::model::precision::ProviderChoice;
use imagegpt::proto::pb;
use imagegpt::runtime::error::EngineError;

use crate::harness::{self, Running, until_sample};
use crate::process;

fn load(provider: ProviderChoice) -> Result<OnnxEngine, EngineError> {
    let model = Model::open(&harness::model_dir("micro"), None).expect("a model");
    OnnxEngine::load(&OnnxOptions {
        provider,
        gpu_memory_limit: Some(1 << 30),
        cuda_graphs: true,
        ..harness::onnx_options(model)
    })
}

fn has_gpu() -> bool {
    load(ProviderChoice::Cuda).is_ok()
}

#[test]
fn auto_takes_the_cpu_and_tells_why() {
    if has_gpu() {
        return;
    }
    let engine = load(ProviderChoice::Auto).expect("the CPU is always there");
    let facts = engine.facts();
    assert_eq!(facts.provider, "cpu");
    let [fallback] = facts.fallbacks.as_slice() else {
        panic!("{:?}", facts.fallbacks);
    };
    assert_eq!(fallback.kind, FallbackKind::Cuda);
    assert!(
        fallback.reason.contains("imagegpt doctor"),
        "{}",
        fallback.reason
    );
    let asked_for = load(ProviderChoice::Cpu).expect("the CPU");
    assert_eq!(asked_for.facts().fallbacks, []);
}

#[test]
fn cuda_is_had_or_an_error() {
    match load(ProviderChoice::Cuda) {
        Ok(engine) => assert_eq!(engine.facts().provider, "cuda"),
        Err(EngineError::Provider(text)) => {
            assert!(text.contains("--execution-provider cpu"), "{text}");
        }
        Err(other) => panic!("{other}"),
    }
}

#[test]
fn compile_says_that_cuda_is_missing_before_it_reads_the_model() {
    if has_gpu() {
        return;
    }
    let dir = tempfile::tempdir().expect("a directory");
    let output = process::program()
        .args(["compile", "models/untrained", "--precision", "bf16"])
        .args(["--provider", "cuda", "--output"])
        .arg(dir.path().join("compiled"))
        .output()
        .expect("the program runs");
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{text}");
    assert!(text.contains("--provider cpu"), "{text}");
    assert!(!text.contains("reading the source"), "{text}");
    assert!(!text.contains(".;"), "{text}");
}

/// A precision that no GPU has is refused by name, with a GPU or without.
#[test]
fn int8_for_cuda_is_refused_by_name() {
    let dir = tempfile::tempdir().expect("a directory");
    let output = process::program()
        .args(["compile", "models/untrained", "--precision", "int8"])
        .args(["--provider", "cuda", "--output"])
        .arg(dir.path().join("compiled"))
        .output()
        .expect("the program runs");
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{text}");
    assert!(text.contains("int8 is not supported on CUDA"), "{text}");
}

/// Waits for a series to be 1: the task that announces the model sets the
/// series while the first calls are served.
async fn told(running: &Running, series: &str) {
    until_sample(running, series, |value| value >= 1.0).await;
}

#[tokio::test]
async fn a_fallback_is_told_to_clients_and_to_prometheus() {
    if has_gpu() {
        return;
    }
    let factory: EngineFactory =
        Box::new(|| Ok(Box::new(load(ProviderChoice::Auto)?) as Box<dyn Engine>));
    let mut running = harness::start(&harness::model_dir("micro"), &[], Some(factory)).await;
    let model = running.client.get_model(pb::GetModelRequest {}).await;
    let model = model.expect("an answer").into_inner();
    assert_eq!(model.execution_provider, "cpu");
    assert_eq!(model.fallbacks.len(), 1);
    assert_eq!(model.fallbacks[0].kind, "cuda");
    let sample = |kind| format!("imagegpt_engine_fallback{{kind=\"{kind}\"}}");
    told(&running, &sample("cuda")).await;
    assert_eq!(running.sample(&sample("cuda_graphs")).await, 0.0);
    running.end().await;
}

#[test]
fn auto_says_in_the_log_that_it_takes_the_cpu() {
    if has_gpu() {
        return;
    }
    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_ansi(false)
        .with_writer(move || writer.clone())
        .finish();
    tracing::subscriber::with_default(subscriber, || load(ProviderChoice::Auto)).expect("the CPU");
    let lines = log.0.lock().expect("no panic").clone();
    let lines = String::from_utf8(lines).expect("text");
    let told = lines
        .lines()
        .find(|line| line.contains("cannot use the CUDA execution provider; running on the CPU"));
    let told = told.unwrap_or_else(|| panic!("{lines}"));
    assert!(
        told.contains(" INFO ") && told.contains("imagegpt doctor"),
        "{told}"
    );
}

/// Log in memory.
#[derive(Clone, Default)]
struct Log(std::sync::Arc<std::sync::Mutex<Vec<u8>>>);

impl std::io::Write for Log {
    fn write(&mut self, text: &[u8]) -> std::io::Result<usize> {
        self.0.lock().expect("no panic").write(text)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn what_a_gpu_does_without_is_told_to_clients_and_to_prometheus() {
    let factory = harness::altered(Script::default(), |engine| {
        let refused = [
            (
                FallbackKind::CudaGraphs,
                "graph hidden: capture was refused",
            ),
            (FallbackKind::GpuCopies, "memory cannot be pinned"),
        ];
        let refused = refused.map(|(kind, reason)| Fallback {
            kind,
            reason: reason.to_owned(),
        });
        engine.facts.fallbacks = refused.into();
    });
    let mut running = harness::start(&harness::model_dir("micro"), &[], Some(factory)).await;
    let model = running.client.get_model(pb::GetModelRequest {}).await;
    let [graphs, copies] = &model.expect("an answer").into_inner().fallbacks[..] else {
        panic!("two fallbacks");
    };
    assert_eq!(graphs.kind, "cuda_graphs");
    assert_eq!(graphs.reason, "graph hidden: capture was refused");
    assert_eq!(copies.kind, "gpu_copies");
    assert_eq!(copies.reason, "memory cannot be pinned");
    let sample = |kind| format!("imagegpt_engine_fallback{{kind=\"{kind}\"}}");
    told(&running, &sample("cuda_graphs")).await;
    told(&running, &sample("gpu_copies")).await;
    assert_eq!(running.sample(&sample("cuda")).await, 0.0);
    running.end().await;
}
