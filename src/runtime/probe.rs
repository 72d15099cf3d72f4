//! Probe of an execution provider: that it is registered, has a device, and can
//! run a graph.

use ort::value::Tensor;
use prost::Message as _;

use crate::model::onnx::{
    DataType, Dim, GraphProto, IR_VERSION, ModelProto, NodeProto, OPSET, OperatorSet,
    ValueInfoProto,
};
use crate::runtime::Runtime;
use crate::runtime::error::{EngineError, cannot_be_had};
use crate::runtime::failure::{Failures, leak_if_lost};

/// Runs a tiny graph on the provider. A provider that registers may still have
/// no device, which only a session notices.
///
/// # Errors
///
/// When the provider cannot be used; the text has the reason and the remedy.
pub fn probe(runtime: &Runtime) -> Result<(), EngineError> {
    let plain = Runtime {
        shares_arena: false,
        cuda_graphs: false,
        operators: None,
        ..runtime.clone()
    };
    let value = |name| ValueInfoProto::tensor(name, DataType::Float, &[Dim::Size(1)]);
    let model = ModelProto {
        ir_version: IR_VERSION,
        opset_import: vec![OperatorSet {
            domain: String::new(),
            version: OPSET,
        }],
        graph: Some(GraphProto {
            name: "probe".to_owned(),
            node: vec![NodeProto {
                op_type: "Neg".to_owned(),
                input: vec!["x".to_owned()],
                output: vec!["y".to_owned()],
                ..NodeProto::default()
            }],
            input: vec![value("x")],
            output: vec![value("y")],
            ..GraphProto::default()
        }),
        ..ModelProto::default()
    };
    let refused = |error: ort::Error| cannot_be_had(runtime.provider, &error);
    let mut session = plain
        .builder()
        .and_then(|mut builder| builder.commit_from_memory(&model.encode_to_vec()))
        .map_err(refused)?;
    let outcome = Tensor::from_array(([1], vec![1.0_f32]))
        .and_then(|x| session.run(ort::inputs!["x" => x]).map(drop))
        .map_err(|error| match Failures::of(runtime).run(&error) {
            lost @ EngineError::Device(_) => lost,
            _ => refused(error),
        });
    outcome.inspect_err(|error| leak_if_lost(session, error))
}
