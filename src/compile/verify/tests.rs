//! Tests of trial runs that fail.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use ort::operator::{
    ComputeContext, Kernel, KernelContext, Operator, OperatorDomain, OperatorInput, OperatorOutput,
    ShapeInferenceContext,
};
use ort::value::TensorElementType;

use super::*;
use crate::compile::{CompileOptions, ModelSource, Silent, compile};
use crate::model::precision::Precision;
use crate::runtime::library::{environment, find_library};
use crate::runtime::operators::{DOMAIN, QUICK_GELU_FP16};

/// Quick-gelu that fails with this text, and counts its kernels that are freed,
/// as they are with their session.
#[derive(Clone)]
struct Failing {
    text: &'static str,
    n_freed: Arc<AtomicUsize>,
}

struct FailingKernel(Failing);

impl Drop for FailingKernel {
    fn drop(&mut self) {
        self.0.n_freed.fetch_add(1, Ordering::Relaxed);
    }
}

impl Operator for Failing {
    type Kernel<'attr> = FailingKernel;

    fn name(&self) -> &str {
        QUICK_GELU_FP16
    }

    fn execution_provider_type(&self) -> Option<&str> {
        Some(Provider::Cpu.runtime_name())
    }

    fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
        [OperatorInput::required(TensorElementType::Float16)]
    }

    fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
        [OperatorOutput::required(TensorElementType::Float16)]
    }

    fn create_kernel(&self, _context: &KernelContext<'_>) -> ort::Result<FailingKernel> {
        Ok(FailingKernel(self.clone()))
    }

    fn infer_shape(&self, context: &mut ShapeInferenceContext) -> ort::Result<()> {
        match context.inputs().into_iter().next() {
            Some(x) => context.set_output(0, &x),
            None => Ok(()),
        }
    }
}

impl Kernel for FailingKernel {
    fn compute(&mut self, _context: &ComputeContext) -> ort::Result<()> {
        Err(ort::Error::new(self.0.text))
    }
}

/// Compiles a model whose trial runs fail with this text; returns the error and
/// the number of kernels that were freed.
fn failed(text: &'static str) -> (CompileError, usize) {
    let n_freed = Arc::default();
    let operator = Failing {
        text,
        n_freed: Arc::clone(&n_freed),
    };
    let environment = environment(&find_library(None)).expect("make setup has brought it");
    let domain = OperatorDomain::new(DOMAIN).and_then(|domain| domain.add(operator));
    #[expect(clippy::arc_with_non_send_sync, reason = "sessions take this type")]
    let domain = Arc::new(domain.expect("a domain"));
    let runtime = Runtime {
        operators: Some(domain),
        ..Runtime::new(environment, Provider::Cpu).expect("a runtime")
    };
    let options = CompileOptions {
        precision: Precision::Fp16,
        provider: Provider::Cuda,
        tasks: Some([CompileTask::Score].into()),
        ..CompileOptions::default()
    };
    let folder = tempfile::tempdir().expect("a folder");
    let source = ModelSource::parse("random:tiny", None);
    let output = folder.path().join("out");
    let compiled = compile(&source, &output, &options, &runtime, &mut Silent);
    let error = compiled.expect_err("no trial run succeeds");
    assert!(!output.exists());
    drop(runtime);
    (error, n_freed.load(Ordering::Relaxed))
}

#[test]
fn a_session_of_a_lost_device_is_not_freed() {
    let (error, n_freed) = failed("CUDA failure 700: an illegal memory access was encountered");
    assert!(matches!(error, CompileError::Device { .. }), "{error:?}");
    let text = error.to_string();
    assert!(
        text.starts_with("graph score could not be tried: the device has failed: "),
        "{text}"
    );
    assert!(text.contains("CUDA failure 700"), "{text}");
    assert_eq!(n_freed, 0);
    // Any other failure is the graph's, and nothing is leaked.
    let (error, n_freed) = failed("a number is not what it should be");
    let text = error.to_string();
    assert!(matches!(error, CompileError::Runtime { .. }), "{error:?}");
    assert!(text.starts_with("graph score does not run: "), "{text}");
    assert!(n_freed > 0);
}
