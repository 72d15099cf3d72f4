//! Which execution provider got which nodes of a graph.
//!
//! A provider takes the nodes that it has kernels for, and ONNX Runtime gives
//! the others to the CPU without a word: a graph that was meant for a GPU may
//! then copy its activations back and forth, and be right and slow.
#![expect(
    unsafe_code,
    reason = "ort has no safe way to ask where nodes were put"
)]

use std::ffi::{CStr, c_char};
use std::ptr;

use ort::AsPointer as _;
use ort::session::Session;
use ort::session::builder::SessionBuilder;

use crate::model::precision::Provider;
use crate::runtime::error::{EngineError, cannot_be_had};
use crate::runtime::{Operators, Runtime};

/// What a session must be told, or else it does not remember.
pub(crate) const RECORD: &str = "session.record_ep_graph_assignment_info";

/// What exporters make of shapes and positions. ONNX Runtime keeps it on the
/// CPU on purpose: a few integers, which a GPU would be asked for in vain.
const OF_SHAPES: [&str; 28] = [
    "Shape",
    "Size",
    "Gather",
    "Concat",
    "Slice",
    "Split",
    "Unsqueeze",
    "Squeeze",
    "Reshape",
    "Expand",
    "Cast",
    "Constant",
    "ConstantOfShape",
    "Range",
    "Add",
    "Sub",
    "Mul",
    "Div",
    "Mod",
    "Neg",
    "Equal",
    "Less",
    "Greater",
    "Where",
    "Not",
    "And",
    "ReduceProd",
    "Identity",
];

/// Operators that compute attention in one piece.
const FUSED_ATTENTION: [&str; 4] = [
    "Attention",
    "MultiHeadAttention",
    "GroupQueryAttention",
    "PackedMultiHeadAttention",
];

/// The nodes of a session by provider and operator, as they were given out
/// before any fusion.
///
/// # Errors
///
/// When ONNX Runtime does not say.
pub(crate) fn placement(session: &Session) -> ort::Result<Operators> {
    let api = ort::api();
    let mut operators = Operators::new();
    let (mut pieces, mut n_pieces) = (ptr::null(), 0);
    // SAFETY: the session lives during the call, and both places are written to
    // before it returns well; the pieces are the session's and live as long.
    let pieces = unsafe {
        let status = (api.Session_GetEpGraphAssignmentInfo)(
            session.ptr(),
            &raw mut pieces,
            &raw mut n_pieces,
        );
        ort::Error::result_from_status(status)?;
        list(pieces, n_pieces)
    };
    for &piece in pieces {
        let (mut nodes, mut n_nodes) = (ptr::null(), 0);
        let mut name: *const c_char = ptr::null();
        // SAFETY: as above; the piece is one of those that were just given.
        let (name, nodes) = unsafe {
            let status = (api.EpAssignedSubgraph_GetEpName)(piece, &raw mut name);
            ort::Error::result_from_status(status)?;
            let status = (api.EpAssignedSubgraph_GetNodes)(piece, &raw mut nodes, &raw mut n_nodes);
            ort::Error::result_from_status(status)?;
            (text(name), list(nodes, n_nodes))
        };
        let of_provider = operators.entry(name).or_default();
        for &node in nodes {
            let mut operator: *const c_char = ptr::null();
            // SAFETY: as above.
            let operator = unsafe {
                let status = (api.EpAssignedNode_GetOperatorType)(node, &raw mut operator);
                ort::Error::result_from_status(status)?;
                text(operator)
            };
            *of_provider.entry(operator).or_default() += 1;
        }
    }
    Ok(operators)
}

/// # Safety
///
/// `first` is null or the first of `n` that live for `'a`.
unsafe fn list<'a, T>(first: *const T, n: usize) -> &'a [T] {
    if first.is_null() || n == 0 {
        return &[];
    }
    // SAFETY: the caller says so.
    unsafe { std::slice::from_raw_parts(first, n) }
}

/// # Safety
///
/// `text` is null or ends with a zero byte.
unsafe fn text(text: *const c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: the caller says so.
    let text = unsafe { CStr::from_ptr(text) };
    text.to_string_lossy().into_owned()
}

/// Refuses a graph of which another provider than `provider` computes
/// something; of graphs that this project made, also one whose attention is not
/// in one piece.
///
/// # Errors
///
/// What is where.
pub(crate) fn check(
    operators: &Operators,
    provider: Provider,
    is_compiled: bool,
) -> Result<(), String> {
    let strays: Vec<String> = operators
        .iter()
        .filter(|(name, _)| *name != provider.runtime_name())
        .flat_map(|(_, operators)| operators)
        .filter(|(operator, _)| !OF_SHAPES.contains(&operator.as_str()))
        .map(|(operator, count)| format!("{operator} ({count})"))
        .collect();
    if !strays.is_empty() {
        return Err(format!(
            "{} has no kernels for some of its nodes, which would run elsewhere and slow \
             everything down: {}",
            provider.runtime_name(),
            strays.join(", ")
        ));
    }
    let own = operators.get(provider.runtime_name());
    let is_fused = own.is_some_and(|own| {
        let mut names = own.keys();
        names.any(|name| FUSED_ATTENTION.contains(&name.as_str()))
    });
    if is_compiled && provider == Provider::Cuda && !is_fused {
        return Err("its attention is not in one operator; compile the model again".to_owned());
    }
    Ok(())
}

/// A session's options, or what to do when the provider cannot be had.
pub(crate) fn builder(runtime: &Runtime) -> Result<SessionBuilder, EngineError> {
    let recording = |builder: SessionBuilder| Ok(builder.with_config_entry(RECORD, "1")?);
    runtime
        .builder()
        .and_then(recording)
        .map_err(|error| cannot_be_had(runtime.provider, &error))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn operators(nodes: &[(&str, &str, usize)]) -> Operators {
        let mut operators = Operators::new();
        for (provider, operator, count) in nodes {
            let of_provider = operators.entry((*provider).to_owned()).or_default();
            of_provider.insert((*operator).to_owned(), *count);
        }
        operators
    }

    const CPU: &str = "CPUExecutionProvider";
    const CUDA: &str = "CUDAExecutionProvider";

    #[test]
    fn shapes_may_be_computed_on_the_cpu() {
        let nodes = [
            (CUDA, "MatMul", 96),
            (CUDA, "MultiHeadAttention", 24),
            (CPU, "Shape", 2),
            (CPU, "Gather", 2),
        ];
        assert_eq!(check(&operators(&nodes), Provider::Cuda, true), Ok(()));
    }

    #[test]
    fn anything_else_may_not() {
        let nodes = [
            (CUDA, "MatMul", 96),
            (CPU, "Shape", 2),
            (CPU, "QuickGelu", 24),
            (CPU, "MultiHeadAttention", 24),
        ];
        let error = check(&operators(&nodes), Provider::Cuda, false).expect_err("on the CPU");
        assert!(
            error.ends_with(": MultiHeadAttention (24), QuickGelu (24)"),
            "{error}"
        );
    }

    #[test]
    fn a_compiled_graph_has_its_attention_in_one_piece() {
        let nodes = [(CUDA, "MatMul", 96), (CUDA, "Softmax", 24)];
        let operators = operators(&nodes);
        assert!(check(&operators, Provider::Cuda, true).is_err());
        assert_eq!(check(&operators, Provider::Cuda, false), Ok(()));
    }
}
