//! Checks the placement of a graph's nodes on execution providers.
//!
//! A provider takes the nodes that it has kernels for, and ONNX Runtime
//! silently gives the others to the CPU: a graph for a GPU may then copy its
//! activations back and forth, and be correct but slow.
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

/// Setting by which a session records the placement of its nodes.
pub(crate) const RECORD: &str = "session.record_ep_graph_assignment_info";

/// Operators of shapes and positions in exported graphs. ONNX Runtime
/// deliberately keeps them on the CPU: they compute a few integers, for which a
/// GPU is no help.
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

/// Fused operators that compute whole attention.
const FUSED_ATTENTION: [&str; 4] = [
    "Attention",
    "MultiHeadAttention",
    "GroupQueryAttention",
    "PackedMultiHeadAttention",
];

/// Returns the number of nodes of a session by provider and operator, as they
/// were assigned before any fusion.
///
/// # Errors
///
/// When ONNX Runtime does not report the assignment.
pub(crate) fn placement(session: &Session) -> ort::Result<Operators> {
    let api = ort::api();
    let mut operators = Operators::new();
    let (mut pieces, mut n_pieces) = (ptr::null(), 0);
    // SAFETY: the session lives during the call, and both variables are written
    // before it returns successfully; the pieces belong to the session and live
    // as long as it does.
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
        // SAFETY: as above; the piece is one of those that were just returned.
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

/// Makes a slice of a list of ONNX Runtime.
///
/// # Safety
///
/// `first` is null or points to the first of `n` values that live for `'a`.
unsafe fn list<'a, T>(first: *const T, n: usize) -> &'a [T] {
    if first.is_null() || n == 0 {
        return &[];
    }
    // SAFETY: the caller guarantees that `first` points to `n` values.
    unsafe { std::slice::from_raw_parts(first, n) }
}

/// Copies a text of ONNX Runtime; null gives an empty text.
///
/// # Safety
///
/// `text` is null or ends with a zero byte.
unsafe fn text(text: *const c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: the caller guarantees that `text` ends with a zero byte.
    let text = unsafe { CStr::from_ptr(text) };
    text.to_string_lossy().into_owned()
}

/// Refuses a graph with nodes on another provider than `provider`, except
/// operators of shapes; with `is_compiled`, also a graph for CUDA without fused
/// attention.
///
/// # Errors
///
/// When the graph is refused; the text lists the nodes on other providers.
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
            "{} has no kernels for some of the graph's nodes, which would run on another provider \
             and slow everything down: {}",
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
        return Err(
            "the graph's attention is not a fused operator; compile the model again".to_owned(),
        );
    }
    Ok(())
}

/// Returns a builder of sessions that record their placement; the error of a
/// provider that cannot be used has the remedy.
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
